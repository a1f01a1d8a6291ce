"""Every backend against a loop over experts in float64: results and both gradients, each expert's part on its own."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.model.moe import grouped_matmul as gm
from moe_train.model.moe.expert_weights import InStack
from moe_train.model.outer_products import NARROW

KERNELS = ("reference", "blocked", "ragged_dot", "megablox")
E, D, F = 5, 12, 20
CASES = {  # rows, and how many of them each expert has
    "even": (320, (64, 64, 64, 64, 64)),
    "random": (320, (71, 3, 120, 66, 60)),
    "empty groups": (320, (0, 200, 0, 120, 0)),
    "single expert": (320, (0, 0, 0, 320, 0)),
    "first expert": (320, (320, 0, 0, 0, 0)),
    "skewed": (320, (1, 0, 290, 1, 28)),
    "rows past the sum": (320, (33, 0, 100, 1, 7)),
    "no rows": (320, (0, 0, 0, 0, 0)),
    "fewer rows than a block": (9, (2, 0, 4, 1, 0)),
    "one row": (1, (0, 0, 0, 0, 1)),
    "all sizes of block": (1400, (700, 31, 0, 513, 129)),
}
TAIL = 1e30
"""What the rows that nobody owns hold: it must reach nothing."""


def loop(x: np.ndarray, w: np.ndarray, dy: np.ndarray, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """y, dx, dw in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw, start = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w), 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += n
    return y, dx, dw


def operands(R: int, sizes: tuple[int, ...], dtype: Any, seed: int = 0, outputs: int = F) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x, w, dy = (rng.normal(size=shape).astype(dtype) for shape in ((R, D), (E, D, outputs), (R, outputs)))
    x[sum(sizes) :] = dy[sum(sizes) :] = TAIL
    return x, w, dy


@cache
def compiled(kernel: str) -> Any:
    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, kernel), x, w)
        return y, *vjp(dy)

    return run


def check(
    kernel: str,
    R: int,
    sizes: tuple[int, ...],
    dtype: Any = np.float32,
    tolerance: float = 1e-5,
    seed: int = 0,
    outputs: int = F,
) -> None:
    arrays = operands(R, sizes, dtype, seed, outputs)
    found = jax.device_get(compiled(kernel)(*arrays, np.array(sizes, np.int32)))
    ends = np.cumsum(sizes)
    for what, a, b in zip(("y", "dx", "dw"), found, loop(*arrays, sizes), strict=True):
        assert a.dtype == dtype, what
        parts = range(E) if what == "dw" else np.split(np.arange(R), ends)
        for part, rows in enumerate(parts):
            error, scale = np.max(np.abs(a[rows].astype(np.float64) - b[rows]), initial=0), np.max(np.abs(b[rows]), initial=0)
            assert error <= tolerance * scale, f"{what} of expert {part}: {error:.3g} beside {scale:.3g}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(kernel: str, case: str) -> None:
    check(kernel, *CASES[case])


@pytest.mark.parametrize("case", ["random", "empty groups", "rows past the sum", "fewer rows than a block", "no rows"])
@pytest.mark.parametrize("outputs", [1, D // NARROW])
def test_the_gradient_of_a_narrow_weight_equals_the_loop(case: str, outputs: int) -> None:
    """As the first factor of an adapter, whose gradient is computed transposed on CPUs."""
    check("blocked", *CASES[case], outputs=outputs)


@pytest.mark.parametrize("case", ["random", "empty groups", "rows past the sum"])
def test_a_weight_in_the_stack_of_all_layers_is_that_of_its_layer(case: str) -> None:
    """Values and gradients are those of the slice, and only the stack is read: the slice holds something else here."""
    R, sizes = CASES[case]
    x, w, dy = operands(R, sizes, np.float32)
    stack = np.stack([np.full_like(w, 7), w, np.full_like(w, 8)])

    def product(x: jax.Array, own: jax.Array, layer: jax.Array) -> jax.Array:
        return gm.grouped_matmul(x, InStack(jnp.asarray(stack), layer, own), jnp.array(sizes), "blocked")

    y, vjp = jax.vjp(lambda x, own: product(x, own, jnp.array(1)), jnp.asarray(x), jnp.full_like(w, jnp.nan))
    for found, expected in zip((y, *vjp(jnp.asarray(dy))), compiled("blocked")(x, w, dy, np.array(sizes, np.int32)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["random", "rows past the sum", "fewer rows than a block", "no rows"])
def test_products_are_added_to_what_is_given(kernel: str, case: str) -> None:
    """Row by row, also past the last group, and with the gradient that a sum has."""
    R, sizes = CASES[case]
    x, w, dy = operands(R, sizes, np.float32)
    x[sum(sizes) :] = dy[sum(sizes) :] = 1.0
    before = np.random.default_rng(1).normal(size=(R, F)).astype(np.float32)

    def added(before: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        return gm.grouped_matmul(x, w, jnp.array(sizes), kernel, add_to_RF=before)

    y, vjp = jax.vjp(added, *map(jnp.asarray, (before, x, w)))
    expected_y, dx, dw = loop(x, w, dy, sizes)
    for found, expected in zip((y, *vjp(jnp.asarray(dy))), (before + expected_y, dy, dx, dw), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["random", "rows past the sum"])
def test_bfloat16_is_rounded_once(kernel: str, case: str) -> None:
    check(kernel, *CASES[case], dtype=jnp.bfloat16, tolerance=2**-7)


def test_megablox_with_many_unaligned_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide weights are cut into tiles on D and F, here 8 wide, so that both have a remainder."""
    monkeypatch.setattr(gm, "_tile", lambda dim, dtype: 8)
    compiled.cache_clear()
    check("megablox", *CASES["random"])
    check("megablox", *CASES["rows past the sum"])
    compiled.cache_clear()


@st.composite
def group_sizes(draw: st.DrawFn, rows: int = 160) -> tuple[int, ...]:
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=E, max_size=E)))
    return tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))


@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot", "megablox"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=group_sizes(), seed=st.integers(0, 3))
@example(sizes=(31, 1, 32, 33, 63), seed=0)
@example(sizes=(128, 0, 0, 0, 32), seed=0)
def test_any_group_sizes(kernel: str, sizes: tuple[int, ...], seed: int) -> None:
    check(kernel, 160, sizes, seed=seed)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 500, 1000, 4096])
def test_the_cost_follows_the_rows_that_exist(size: int) -> None:
    """Rows that `blocked` multiplies for a group, whatever the number of rows there are."""
    count = lambda rows, start, mine, total: total + rows  # noqa: E731
    done = gm.over_blocks(jnp.int32(0), jnp.int32(size), 4096, gm.ROW_BLOCKS, count, jnp.int32(0))
    assert size <= done < size + min(gm.ROW_BLOCKS)


def test_few_rows_are_multiplied_in_small_blocks() -> None:
    assert [gm.row_blocks(rows, 8)[-1] for rows in (2, 16, 64, 128, 4096)] == [1, 2, 8, 16, 32]
    assert gm.row_blocks(4096, 8) == gm.ROW_BLOCKS


def test_check_finds_a_misplaced_row() -> None:
    """The comparison itself: one row given to the neighbour is more than the tolerance."""
    x, w, dy = operands(320, (64,) * E, np.float32)
    right, wrong = loop(x, w, dy, (64, 64, 64, 64, 64)), loop(x, w, dy, (64, 65, 63, 64, 64))
    for a, b in zip(right, wrong, strict=True):
        assert np.max(np.abs(a - b)) > 0.1


def test_unknown_kernel_is_an_error() -> None:
    with pytest.raises(AssertionError, match="sorcery"):
        gm.grouped_matmul(jnp.ones((1, D)), jnp.ones((E, D, F)), jnp.ones(E, jnp.int32), "sorcery")
