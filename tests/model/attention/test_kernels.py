"""The plain reference against numpy in float64, and what every kernel must mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.attention import kernels
from tests.model.attention.against_reference import B, H, K, N, check, found, operands, segments_of
from tests.model.attention.shared_prompts import check_shared, random_rows


@pytest.mark.parametrize("window", [None, 7])
def test_reference_equals_numpy(window: int | None) -> None:
    T = 20
    (q, k, v, dy), (segments, positions) = operands(T), segments_of(T)
    wanted = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys = [s for s in range(T) if segments[b, s] == segments[b, t] and 0 <= positions[b, t] - positions[b, s] < (window or T)]
        scores = np.array([q[b, t, n].astype(float) @ k[b, s, n // (N // K)] for s in keys]) / H**0.5
        weights = np.exp(scores - scores.max())
        wanted[b, t, n] = weights @ v[b, keys, n // (N // K)] / weights.sum()
    np.testing.assert_allclose(found("reference", window, (q, k, v, dy))[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_on_a_mesh(kernel: str, window: int | None) -> None:
    """Heads and sequences on several devices; splash runs in interpret mode."""
    check(kernel, window, operands(256), 1e-5, make_mesh(config.Mesh(fsdp=2, tensor=2), jax.devices()[:4]))


@pytest.mark.parametrize(("kernel", "window"), [("reference", 5), pytest.param("blocked", 40, marks=pytest.mark.slow)])
def test_shared_prompts_on_a_mesh(kernel: str, window: int) -> None:
    mesh = make_mesh(config.Mesh(context=2, tensor=2), jax.devices()[:4])
    check_shared(kernel, window, random_rows(2, 64, 9), (4, 2, 6), mesh)
    assert kernels.takes_shared_prompts(kernel) and not kernels.takes_shared_prompts("splash")


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
@pytest.mark.parametrize("width", [4, 9])
def test_values_narrower_or_wider_than_queries(kernel: str, width: int) -> None:
    check(kernel, None, operands(128, width=width), 1e-5)


@pytest.mark.parametrize("width", [4, 9])
def test_padding_to_one_width_for_cudnn_is_exact(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same product by XLA, whose widths have to be equal too."""
    without_kernel = jax.nn.dot_product_attention

    def by_xla(*arrays: Any, implementation: str, **settings: Any) -> Any:
        assert implementation == "cudnn"
        return without_kernel(*arrays, **settings, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    q, k, v = (jnp.asarray(x) for x in operands(20, width=width)[:3])
    visible = jnp.broadcast_to(jnp.tri(20, dtype=bool), (B, 20, 20))
    actual = kernels.cudnn_attention(q, k, v, visible)
    assert actual.shape == (B, 20, N, width)
    np.testing.assert_allclose(actual, kernels.reference_attention(q, k, v, visible), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["reference", "blocked", "splash"])
@pytest.mark.parametrize("window", [None, 100])
def test_segments_never_see_each_other(kernel: str, window: int | None) -> None:
    """Other numbers in one segment leave the results and gradients of all others as they are, bit for bit."""
    T = 256
    arrays = operands(T)
    changed = [x.copy() for x in arrays]
    for x in changed:
        x[1, T // 5 : T // 2] = 10 * x[1, T // 5 : T // 2] + 1
    others = np.ones((B, T), bool)
    others[1, T // 5 : T // 2] = False
    before, after = found(kernel, window, arrays), found(kernel, window, changed)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[others], b[others])
        assert (a[~others] != b[~others]).any()


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
def test_the_future_is_never_seen(kernel: str) -> None:
    T, t = 256, 130
    arrays = operands(T)
    changed = [x.copy() for x in arrays]
    for x in changed[:3]:
        x[0, t:] = -x[0, t:]
    before, after = found(kernel, None, arrays)[0], found(kernel, None, changed)[0]
    np.testing.assert_array_equal(before[0, :t], after[0, :t])
    assert (before[0, t:] != after[0, t:]).any()
