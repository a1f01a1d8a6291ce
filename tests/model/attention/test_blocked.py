"""Attention in blocks against the plain reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.model.attention import blocked
from moe_train.model.attention.blocked import PositionMask, SegmentIds, blocked_attention
from tests.model.attention.against_reference import check, operands
from tests.model.attention.shared_prompts import check_shared, random_rows


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller blocks, of which short sequences have several."""
    monkeypatch.setattr(blocked, "cpu_cores", lambda: 1)


@pytest.mark.parametrize(
    ("T", "window"),
    [(300, None), (300, 2), (300, 200), (128, 1000), (20, 7), (2100, 300)],
)
def test_blocked_equals_the_reference(T: int, window: int | None) -> None:
    check("blocked", window, operands(T), 1e-5)


@pytest.mark.parametrize(
    ("T", "heads"),
    [(200, (4, 4, 6)), (200, (4, 1, 10)), (565, (3, 1, 6))],
    ids=["a key for each head", "one key for all heads", "a block of padding alone"],
)
def test_blocked_with_other_heads(T: int, heads: tuple[int, int, int]) -> None:
    check("blocked", 50, operands(T, heads=heads), 1e-5)


def test_the_larger_blocks_of_several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    small = blocked._layout(1300, 1300, 1, 2)
    monkeypatch.setattr(blocked, "cpu_cores", lambda: 2)
    layout = blocked._layout(1300, 1300, 1, 2)
    assert (small.run_blocks, small.key_blocks) == (11, 11)
    assert (layout.run_blocks, layout.key_blocks) == (6, 6)
    assert layout.queries * layout.groups >= 256 and layout.keys >= 192
    check("blocked", 277, operands(1300), 1e-5)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("starts", [(0,), (200, 1000)], ids=["whole", "two runs"])
def test_no_pair_of_blocks_with_a_visible_key_is_skipped(starts: tuple[int, ...], window: int | None) -> None:
    T, t, G = 1400, 1400 // len(starts) if len(starts) == 1 else 400, 2
    rng = np.random.default_rng(0)
    # Documents of any length, numbered in any order, with padding at the end.
    keys = np.repeat(rng.permutation(40), rng.integers(1, 60, 40))[:T]
    keys = jnp.asarray(np.pad(keys, (0, T - len(keys))))[None]
    run = t // len(starts)
    queries = jnp.concatenate([keys[:, start : start + run] for start in starts], axis=1)
    layout = blocked._layout(t, T, len(starts), G)
    mask = PositionMask((starts,), window)
    places = blocked._places(SegmentIds(queries, keys), jnp.int32(0), mask, layout)
    may_see = np.asarray(blocked._may_see(places, layout, mask))[0]
    assert may_see.shape[0] > 2 and not may_see.all()
    first, end = (np.asarray(x)[0] for x in blocked._bounds(jnp.asarray(may_see)[None]))
    for i, j in np.ndindex(may_see.shape):
        visible = bool(blocked._visible(places, layout, jnp.int32(0), jnp.int32(i), jnp.int32(j), mask).any())
        assert may_see[i, j] or not visible
        assert first[i] <= j < end[i] or not may_see[i, j]


@pytest.mark.parametrize(
    ("T", "longest", "window"),
    [
        (300, 70, 40),
        pytest.param(300, 70, None, marks=pytest.mark.slow),
        pytest.param(600, 300, 100, marks=pytest.mark.slow),
        pytest.param(60, 9, 3, marks=pytest.mark.slow),
    ],
)
def test_answers_that_share_a_prompt_see_it_as_if_each_had_its_own(T: int, longest: int, window: int | None) -> None:
    check_shared("blocked", window, random_rows(2, T, longest), (4, 2, 6))


def test_memory_is_linear_in_the_length() -> None:
    """Of the program, forward and backward, by the compiler; nothing is run."""

    def temporaries(T: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 32), jnp.float32) for heads in (4, 2))
        ids = jnp.ones((1, T), jnp.int32)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = PositionMask(((0,),), None)
            return jnp.sum(blocked_attention(q, k, v, SegmentIds(ids, ids), jnp.int32(0), mask))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    # Eight copies of the queries; the scores of one head alone would take 4 GiB.
    assert temporaries(32768) < 8 * 32768 * 4 * 32 * 4
    assert temporaries(4096) < 1.2 * temporaries(32768) / 8 + 2**21


@pytest.mark.parametrize("window", [None, 50])
def test_blocked_in_bfloat16(window: int | None) -> None:
    check("blocked", window, operands(300, jnp.bfloat16), 2e-2)
