"""Attention: the plain reference against numpy in float64, every other path against the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.attention import context_parallel, gqa, kernels
from tests.compiled_programs import quick_jit

B, N, K, H = 2, 4, 2, 6
ONE = make_mesh(config.Mesh(), jax.devices()[:1])


def segments_of(T: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment ids, positions): one row whole, one packed with padding at its end."""
    ids, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for segment, (start, end) in enumerate(((0, T // 5), (T // 5, T // 2), (T // 2, T - T // 8), (T - T // 8, T))):
        ids[1, start:end], positions[1, start:end] = (segment + 1) % 4, np.arange(end - start)
    return ids, positions


def operands(T: int, dtype: Any = np.float32, heads: tuple[int, int, int] = (N, K, H)) -> tuple[np.ndarray, ...]:
    """q, k, v, dy; what padding gets is not asked for."""
    n, kv, h = heads
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.normal(size=(B, T, x, h)).astype(dtype) for x in (n, kv, kv, n))
    dy[segments_of(T)[0] == 0] = 0
    return q, k, v, dy


@cache
def compiled(kernel: str, window: int | None, mesh: Mesh = ONE) -> Any:
    @quick_jit
    def run(q: Any, k: Any, v: Any, dy: Any, segments: Any, positions: Any) -> Any:
        y, vjp = jax.vjp(lambda q, k, v: kernels.attend(q, k, v, positions, segments, window, kernel), q, k, v)
        return y, *vjp(dy)

    return run


def found(kernel: str, window: int | None, arrays: Any, mesh: Mesh = ONE) -> list[np.ndarray]:
    T = arrays[0].shape[1]
    specs = (P(BATCH, "context", "tensor", None),) * 4 + (P(BATCH, "context"),) * 2
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*arrays, *segments_of(T)), specs, strict=True))
        return [np.asarray(x, np.float64) for x in jax.device_get(compiled(kernel, window, mesh)(*placed))]


def check(kernel: str, window: int | None, arrays: Any, tolerance: float, mesh: Mesh = ONE) -> None:
    seen = segments_of(arrays[0].shape[1])[0] != 0
    exact = [x.astype(np.float32) for x in arrays]
    for name, a, b in zip(
        ("y", "dq", "dk", "dv"), found(kernel, window, arrays, mesh), found("reference", window, exact), strict=True
    ):
        assert np.max(np.abs(a - b)[seen]) <= tolerance * np.max(np.abs(b)), name


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


@pytest.mark.parametrize(
    ("T", "window"),
    [(300, None), (300, 2), (300, 200), (128, 1000), (20, 7), (2100, 300)],
)
def test_blocked_equals_the_reference(T: int, window: int | None) -> None:
    check("blocked", window, operands(T), 1e-5)


@pytest.mark.parametrize("heads", [(4, 4, 6), (4, 1, 10)], ids=["a key for each head", "one key for all heads"])
def test_blocked_with_other_heads(heads: tuple[int, int, int]) -> None:
    check("blocked", 50, operands(200, heads=heads), 1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_blocked_in_bfloat16(window: int | None) -> None:
    check("blocked", window, operands(300, jnp.bfloat16), 2e-2)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_on_a_mesh(kernel: str, window: int | None) -> None:
    """Heads and sequences on several devices; splash runs in interpret mode."""
    check(kernel, window, operands(256), 1e-5, make_mesh(config.Mesh(fsdp=2, tensor=2), jax.devices()[:4]))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("kernel", "T"), [("reference", 48), ("blocked", 600), ("splash", 1024)])
def test_a_sequence_on_several_devices(kernel: str, T: int, window: int | None) -> None:
    """Segments lie across the cuts; keys are gathered, and their gradients sent back to where they came from."""
    check(kernel, window, operands(T), 1e-5, make_mesh(config.Mesh(context=4, tensor=2)))


def test_an_odd_number_of_parts() -> None:
    check("blocked", 50, operands(60), 1e-5, make_mesh(config.Mesh(context=3), jax.devices()[:3]))


@pytest.mark.parametrize("c", [1, 2, 3, 4, 8])
def test_every_device_attends_to_as_many_pairs(c: int) -> None:
    """And every query has one device."""
    T = 16 * c
    with jax.set_mesh(make_mesh(config.Mesh(context=c), jax.devices()[:c])):
        parts = context_parallel.parts(T)
    run = T // c // len(parts[0])
    queries = [[t for start in starts for t in range(start, start + run)] for starts in parts]
    assert sorted(t for device in queries for t in device) == list(range(T))
    assert len({sum(t + 1 for t in device) for device in queries}) == 1


def test_splash_in_bfloat16() -> None:
    check("splash", None, operands(128, jnp.bfloat16), 2e-2)


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


def test_query_scaling() -> None:
    scaling = config.QueryScaling(beta=0.1, original_max_seq_len=8)
    positions = np.array([[0, 7, 8, 15, 16, 80]])
    wanted = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 11])
    found = gqa._query_scale(scaling, jnp.asarray(positions))
    np.testing.assert_allclose(found[0, :, 0, 0], wanted, rtol=1e-6)
