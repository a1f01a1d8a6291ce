"""Attention in plain XLA, for CPUs and wherever no other kernel fits: an online softmax over blocks of keys, in linear memory.

Loops run over sequences and key heads, blocks of queries and blocks of keys, and visit only pairs of blocks in which some query
may see some key. A block of scores is small enough for the caches of a CPU core. It has the keys along its rows: maximum and sum
of the softmax then run over whole vectors, and no product needs a transposed copy of it. In shapes, S stands for the keys of a
block, and R for its queries, those of the G query heads that share the key head side by side. Values may have another width W
than keys.

The forward pass is that of FlashAttention-2 (arXiv:2307.08691, algorithm 1). The backward pass recomputes the weights from the
saved log-sum-exp (algorithm 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_train.machine.cores import cpu_cores
from moe_train.machine.mesh import platform
from moe_train.model.attention.context_parallel import RunStarts

NEG = -1e30
"""Score of a masked pair. It is finite, so that a row without any visible key stays finite."""
VECTOR = 16
"""Blocks are multiples of this, the float32 numbers of the longest vectors of CPUs."""
_NO_SEGMENT = np.iinfo(np.int32).max
"""Segment id of padded keys; no query has it."""


class SharedPrompts(NamedTuple):
    """Prompts that several answers of a row continue, each from the prompt's last position on."""

    prompt_ids_Bt: Int[Array, "B t"]
    """Segment id of the prompt that each query sees besides its own segment; its own segment id where it continues none."""
    queries_Bt: Int[Array, "B t"]
    """Positions of the queries, by which a window counts: an answer need not stand next to its prompt."""
    keys_BT: Int[Array, "B T"]
    """Positions of the keys."""


class SegmentIds(NamedTuple):
    """Segment ids of queries and keys; a query sees only keys with its own id, and those of the prompt that it continues."""

    queries_Bt: Int[Array, "B t"]
    keys_BT: Int[Array, "B T"]
    shared: SharedPrompts | None = None
    """None if no segment continues another."""


@dataclass(frozen=True)
class PositionMask:
    """The static part of the mask: where the queries of each device stand in the sequence, and which positions they see."""

    run_starts: RunStarts
    """Positions where the runs of queries of each device of `context` start."""
    window: int | None
    """A query sees only keys less than `window` positions before it; None for no limit."""
    is_causal: bool = True
    """Whether a query sees only keys that are not later than itself; if not, it sees its whole segment."""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blocked_attention(
    q_BtNH: Float[Array, "B t N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    segment_ids: SegmentIds,
    device: Int[Array, ""],
    mask: PositionMask,
) -> Float[Array, "B t N W"]:
    """Compute attention block by block; pairs of blocks without any visible key are skipped.

    Args:
        q_BtNH: queries, in runs that start at the positions `mask.run_starts[device]`.
        k_BTKH: keys of the full sequence.
        v_BTKW: values of the full sequence.
        segment_ids: segment ids of the queries and of the keys.
        device: index of this device on `context`.
        mask: positions of the queries, and which positions they see; static.

    Returns:
        The attention output (B, t, N, W), in the order of the queries.
    """
    return _blocked_forward(q_BtNH, k_BTKH, v_BTKW, segment_ids, device, mask)[0]


class _Residuals(NamedTuple):
    """Arrays that the forward pass saves for the backward pass."""

    q_BtNH: Float[Array, "B t N H"]
    k_BTKH: Float[Array, "B T K H"]
    v_BTKW: Float[Array, "B T K W"]
    segment_ids: SegmentIds
    device: Int[Array, ""]
    y_BtNW: Float[Array, "B t N W"]
    lse_BKiR: Float[Array, "B K i R"]
    """Log of the sum of the exponentials of the scores, by block of queries."""


class _Layout(NamedTuple):
    """How queries and keys are split into blocks; runs of queries and the sequence of keys are padded to whole blocks."""

    runs: int
    """Number of runs of queries."""
    run_blocks: int
    """Blocks of a run."""
    queries: int
    """Queries of a block."""
    key_blocks: int
    keys: int
    """Keys of a block."""
    groups: int
    """Query heads G that share a key head."""


def _layout(t: int, T: int, runs: int, groups: int) -> _Layout:
    """Split t queries in `runs` runs, and T keys, into blocks of about equal size."""
    most_rows, most_keys = _largest_block()
    run_blocks, queries = _equal_blocks(t // runs, max(VECTOR, most_rows // groups))
    key_blocks, keys = _equal_blocks(T, most_keys)
    return _Layout(runs, run_blocks, queries, key_blocks, keys, groups)


def _largest_block() -> tuple[int, int]:
    """Return the most rows R of a block, its queries times the query heads that share a key head, and its most keys.

    One core is fastest with blocks that fit its own cache. XLA:CPU divides a product among cores only if it has 256 x 256 results
    or more: with the larger blocks, attention takes 11 to 19% less time on two cores, and 15% more on one.
    """
    return (512, 256) if platform() == "cpu" and cpu_cores() > 1 else (256, 128)


def _equal_blocks(length: int, most: int) -> tuple[int, int]:
    """Return (number of blocks, size of a block): as few blocks as possible, and as little padding."""
    count = -(-length // most)
    size = -(-length // count)
    return count, -(-size // VECTOR) * VECTOR


def _query_blocks(x_BtNH: Shaped[Array, "B t N H"], layout: _Layout) -> Shaped[Array, "B K i R H"]:
    """Split (B, t, N, H) into the blocks of queries of each key head."""
    B, t, N, H = x_BtNH.shape
    runs, run_blocks, queries, _, _, groups = layout
    run = t // runs
    x = jnp.pad(x_BtNH.reshape(B, runs, run, N, H), ((0, 0), (0, 0), (0, run_blocks * queries - run), (0, 0), (0, 0)))
    x = x.reshape(B, runs * run_blocks, queries, N // groups, groups, H).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, N // groups, runs * run_blocks, groups * queries, H)


def _from_query_blocks(x_BKiHR: Shaped[Array, "B K i H R"], layout: _Layout, t: int) -> Shaped[Array, "B t N H"]:
    """Undo `_query_blocks` for blocks that have their queries along the last dim, and remove the padding."""
    B, K, _, H, _ = x_BKiHR.shape
    runs, run_blocks, queries, _, _, groups = layout
    x = x_BKiHR.reshape(B, K, runs * run_blocks, H, groups, queries).transpose(0, 2, 5, 1, 4, 3)
    return x.reshape(B, runs, run_blocks * queries, K * groups, H)[:, :, : t // runs].reshape(B, t, K * groups, H)


def _key_blocks(x_BTKH: Shaped[Array, "B T K H"], layout: _Layout) -> Shaped[Array, "B K j S H"]:
    """Split (B, T, K, H) into the blocks of each key head."""
    B, T, K, H = x_BTKH.shape
    x = jnp.pad(x_BTKH, ((0, 0), (0, layout.key_blocks * layout.keys - T), (0, 0), (0, 0)))
    return x.reshape(B, layout.key_blocks, layout.keys, K, H).transpose(0, 3, 1, 2, 4)


def _from_key_blocks(x_BKjSH: Shaped[Array, "B K j S H"], T: int) -> Shaped[Array, "B T K H"]:
    """Undo `_key_blocks`, and remove the padding."""
    B, K, j, S, H = x_BKjSH.shape
    return x_BKjSH.transpose(0, 2, 3, 1, 4).reshape(B, j * S, K, H)[:, :T]


class _Places(NamedTuple):
    """Positions and segments of queries and keys by block."""

    first_i: Int[Array | np.ndarray, " i"]
    """Position of the first query of a block; a constant of the program if `context` has one device."""
    last_i: Int[Array | np.ndarray, " i"]
    """Position of its last query, which padding repeats."""
    segments_BiR: Int[Array, "B i R"]
    segments_BjS: Int[Array, "B j S"]
    shared: _SharedPlaces | None
    """None if no segment continues another."""


class _SharedPlaces(NamedTuple):
    """`SharedPrompts` by block."""

    prompts_BiR: Int[Array, "B i R"]
    positions_BiR: Int[Array, "B i R"]
    positions_BjS: Int[Array, "B j S"]


def _places(segment_ids: SegmentIds, device: Int[Array, ""], mask: PositionMask, layout: _Layout) -> _Places:
    """Return the places of all blocks; padding repeats the last query or key, but padded keys come after every query."""
    runs, run_blocks, queries, key_blocks, keys, groups = layout
    B, t = segment_ids.queries_Bt.shape
    run = t // runs
    starts_cr = np.array(mask.run_starts, np.int32)
    devices = len(starts_cr)
    end_cr1 = starts_cr[:, :, None] + run
    # Rounded up to whole vectors, the last blocks of a run may be padding alone.
    first_cri = np.minimum(starts_cr[:, :, None] + np.arange(0, run_blocks * queries, queries, dtype=np.int32), end_cr1 - 1)
    last_cri = np.minimum(first_cri + queries, end_cr1) - 1
    first_ci, last_ci = (x.reshape(devices, runs * run_blocks) for x in (first_cri, last_cri))

    def of_queries(x_Bt: Int[Array, "B t"]) -> Int[Array, "B i R"]:
        padded = _repeat_last(x_Bt.reshape(B, runs, run), run_blocks * queries)
        # Every query head of a group has the same queries.
        return jnp.tile(padded.reshape(B, runs * run_blocks, queries), (1, 1, groups))

    def of_keys(x_BT: Int[Array, "B T"]) -> Int[Array, "B j S"]:
        return _repeat_last(x_BT, key_blocks * keys).reshape(B, key_blocks, keys)

    shared = None
    if segment_ids.shared is not None:
        prompts, query_positions, key_positions = segment_ids.shared
        shared = _SharedPlaces(of_queries(prompts), of_queries(query_positions), of_keys(key_positions))
    key_segments = _repeat_last(segment_ids.keys_BT, key_blocks * keys)
    if not mask.is_causal:
        # No position hides the keys of padding then, so they get a segment that no query has.
        key_segments = jnp.where(np.arange(key_blocks * keys) < segment_ids.keys_BT.shape[1], key_segments, _NO_SEGMENT)
    return _Places(
        first_ci[0] if devices == 1 else jnp.asarray(first_ci)[device],
        last_ci[0] if devices == 1 else jnp.asarray(last_ci)[device],
        of_queries(segment_ids.queries_Bt),
        key_segments.reshape(B, key_blocks, keys),
        shared,
    )


def _repeat_last(x: Int[Array, "*dims n"], length: int) -> Int[Array, "*dims m"]:
    """Pad the last dim to a length with its last entry."""
    missing = length - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge") if missing else x


_Index = Int[Array, ""]
"""Index of a sequence (b), a block of queries (i) or a block of keys (j)."""


def _visible(places: _Places, layout: _Layout, b: _Index, i: _Index, j: _Index, mask: PositionMask) -> Bool[Array, "S R"]:
    """Return the mask of a pair of blocks, true where the query sees the key."""
    segments_S1 = places.segments_BjS[b, j][:, None]
    in_segment = places.segments_BiR[b, i][None, :] == segments_S1
    if places.shared is not None:
        in_segment |= places.shared.prompts_BiR[b, i][None, :] == segments_S1
    if not mask.is_causal:
        return in_segment
    queries_R = np.tile(np.arange(layout.queries, dtype=np.int32), layout.groups)
    positions_R = jnp.minimum(jnp.asarray(places.first_i)[i] + queries_R, jnp.asarray(places.last_i)[i])
    positions_S = j * layout.keys + np.arange(layout.keys, dtype=np.int32)
    distance = positions_R[None, :] - positions_S[:, None]
    visible = (distance >= 0) & in_segment
    if mask.window is None:
        return visible
    if places.shared is not None:
        distance = places.shared.positions_BiR[b, i][None, :] - places.shared.positions_BjS[b, j][:, None]
    return visible & (distance < mask.window)


def _may_see(places: _Places, layout: _Layout, mask: PositionMask) -> Bool[Array, "B i j"]:
    """Return which pairs of blocks may have a visible key: those whose ranges of positions and of segments allow it."""
    segments_i = places.segments_BiR[:, :, None, : layout.queries]
    segments_j = places.segments_BjS[:, None]
    # A prompt stands before its answers, and has a smaller segment id.
    lowest_i = segments_i if places.shared is None else places.shared.prompts_BiR[:, :, None, : layout.queries]
    overlaps_Bij = jnp.min(lowest_i, axis=-1) <= jnp.max(segments_j, axis=-1)
    overlaps_Bij &= jnp.min(segments_j, axis=-1) <= jnp.max(segments_i, axis=-1)
    if not mask.is_causal:
        return overlaps_Bij
    first_j = np.arange(0, layout.key_blocks * layout.keys, layout.keys, dtype=np.int32)
    in_reach_ij = places.last_i[:, None] >= first_j
    if mask.window is not None and places.shared is not None:
        nearest_Bi1 = jnp.min(places.shared.positions_BiR, axis=-1)[:, :, None]
        overlaps_Bij &= nearest_Bi1 - jnp.max(places.shared.positions_BjS, axis=-1)[:, None] < mask.window
    elif mask.window is not None:
        in_reach_ij &= places.first_i[:, None] - (first_j + layout.keys - 1) < mask.window
    return jnp.asarray(in_reach_ij) & overlaps_Bij


def _bounds(seen: Bool[Array, "B n m"]) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Return (first true index, last true index + 1) along the last dim; (m, m) if there is none."""
    m = seen.shape[-1]
    indices = jnp.arange(m)
    first = jnp.min(jnp.where(seen, indices, m), axis=-1)
    return first, jnp.maximum(first, jnp.max(jnp.where(seen, indices + 1, 0), axis=-1))


def _blocked_forward(
    q_BtNH: Float[Array, "B t N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    segment_ids: SegmentIds,
    device: Int[Array, ""],
    mask: PositionMask,
) -> tuple[Float[Array, "B t N W"], _Residuals]:
    t, N, H = q_BtNH.shape[1:]
    B, T, K, W = v_BTKW.shape
    layout = _layout(t, T, len(mask.run_starts[0]), N // K)
    q = _query_blocks(q_BtNH * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype), layout)
    k = _key_blocks(k_BTKH, layout)
    # With the keys along the last dim, as the product with the weights takes them.
    v = _key_blocks(v_BTKW, layout).swapaxes(-1, -2)
    places = _places(segment_ids, device, mask, layout)
    first_Bi, end_Bi = _bounds(_may_see(places, layout, mask))
    blocks, R = q.shape[2:4]

    def of_queries(index: Int[Array, ""]) -> tuple[Float[Array, "W R"], Float[Array, " R"]]:
        head, i = jnp.divmod(index, blocks)
        b, kv = jnp.divmod(head, K)
        q_RH = q[b, kv, i]

        def add_keys(
            j: Int[Array, ""], carry: tuple[Float[Array, " R"], Float[Array, " R"], Float[Array, "W R"]]
        ) -> tuple[Float[Array, " R"], Float[Array, " R"], Float[Array, "W R"]]:
            top_R, total_R, y_WR = carry
            scores = jnp.einsum("SH,RH->SR", k[b, kv, j], q_RH, preferred_element_type=jnp.float32)
            scores = jnp.where(_visible(places, layout, b, i, j, mask), scores, NEG)
            new_top_R = jnp.maximum(top_R, jnp.max(scores, axis=0))
            # While a query has seen no key, its weights are those of masked keys; the first visible key scales them to zero.
            weights = jnp.exp(scores - new_top_R)
            scale_R = jnp.exp(top_R - new_top_R)
            y_WR *= scale_R
            y_WR += jnp.einsum("WS,SR->WR", v[b, kv, j], weights.astype(v.dtype), preferred_element_type=jnp.float32)
            return new_top_R, total_R * scale_R + jnp.sum(weights, axis=0), y_WR

        # Made from the queries, so that the carry varies along the same mesh axes as what is added to it.
        start = (
            jax.lax.full_like(q_RH, NEG, jnp.float32, (R,)),
            jax.lax.full_like(q_RH, 0, jnp.float32, (R,)),
            jax.lax.full_like(q_RH, 0, jnp.float32, (W, R)),
        )
        top_R, total_R, y_WR = jax.lax.fori_loop(first_Bi[b, i], end_Bi[b, i], add_keys, start)
        # Normalizing y costs less than normalizing the weights: W entries per query instead of T.
        return (y_WR / total_R).astype(q.dtype), top_R + jnp.log(total_R)

    y, lse = jax.lax.map(of_queries, jnp.arange(B * K * blocks))
    y_BtNW = _from_query_blocks(y.reshape(B, K, blocks, W, R), layout, t)
    # Both residuals are named: if only y were saved, the backward pass would compute all scores again for the log-sum-exp.
    lse_BKiR = checkpoint_name(lse.reshape(B, K, blocks, R), "attention")
    y_BtNW = checkpoint_name(y_BtNW, "attention")
    return y_BtNW, _Residuals(q_BtNH, k_BTKH, v_BTKW, segment_ids, device, y_BtNW, lse_BKiR)


_KeyGradients = tuple[Float[Array, "i H R"], Float[Array, "S H"], Float[Array, "S W"]]
"""Gradients of the queries of a key head, and of one block of its keys and values, all in float32."""


def _blocked_backward(
    mask: PositionMask, saved: _Residuals, dy_BtNW: Float[Array, "B t N W"]
) -> tuple[Float[Array, "B t N H"], Float[Array, "B T K H"], Float[Array, "B T K W"], None, None]:
    t, N, H = saved.q_BtNH.shape[1:]
    B, T, K, _ = saved.v_BTKW.shape
    layout = _layout(t, T, len(mask.run_starts[0]), N // K)
    scale = jnp.asarray(1 / math.sqrt(H), saved.q_BtNH.dtype)
    q = _query_blocks(saved.q_BtNH * scale, layout)
    k = _key_blocks(saved.k_BTKH, layout)
    v = _key_blocks(saved.v_BTKW, layout)
    dy = _query_blocks(dy_BtNW, layout)
    # The row sum of dy * y is the term of the softmax gradient that all entries of a row share. For a batch of one sequence XLA:CPU
    # takes ten times as long to reduce the products of the two arrays.
    dy32_BtNW, y32_BtNW = dy_BtNW.astype(jnp.float32), saved.y_BtNW.astype(jnp.float32)
    common_BtN = jnp.einsum("BtNW,BtNW->BtN", dy32_BtNW, y32_BtNW, precision=jax.lax.Precision.HIGHEST)
    common = _query_blocks(common_BtN[..., None], layout)[..., 0]
    places = _places(saved.segment_ids, saved.device, mask, layout)
    first_Bj, end_Bj = _bounds(_may_see(places, layout, mask).swapaxes(1, 2))
    blocks, R = q.shape[2:4]

    def of_head(head: Int[Array, ""]) -> tuple[Float[Array, "i H R"], Float[Array, "j S H"], Float[Array, "j S W"]]:
        b, kv = jnp.divmod(head, K)

        def of_keys(dq_iHR: Float[Array, "i H R"], j: Int[Array, ""]) -> tuple[Float[Array, "i H R"], Any]:
            k_SH = k[b, kv, j]
            v_SW = v[b, kv, j]

            def add_queries(i: Int[Array, ""], carry: _KeyGradients) -> _KeyGradients:
                dq_iHR, dk_SH, dv_SW = carry
                q_RH = q[b, kv, i]
                dy_RW = dy[b, kv, i]
                scores = jnp.einsum("SH,RH->SR", k_SH, q_RH, preferred_element_type=jnp.float32)
                # exp may overflow for a masked pair, whose score the log-sum-exp does not contain; the select discards it.
                visible = _visible(places, layout, b, i, j, mask)
                weights = jnp.where(visible, jnp.exp(scores - saved.lse_BKiR[b, kv, i]), 0)
                dweights = jnp.einsum("SW,RW->SR", v_SW, dy_RW, preferred_element_type=jnp.float32)
                # Gradient of the softmax: ds = w * (dw - sum(w * dw)), where the sum is `common`.
                dscores = (weights * (dweights - common[b, kv, i])).astype(k.dtype)
                weights = weights.astype(dy.dtype)
                dv_SW += jnp.einsum("SR,RW->SW", weights, dy_RW, preferred_element_type=jnp.float32)
                dk_SH += jnp.einsum("SR,RH->SH", dscores, q_RH, preferred_element_type=jnp.float32)
                dq_HR = jnp.einsum("HS,SR->HR", k_SH.T, dscores, preferred_element_type=jnp.float32)
                return dq_iHR.at[i].add(dq_HR), dk_SH, dv_SW

            start = (
                dq_iHR,
                jax.lax.full_like(dq_iHR, 0, jnp.float32, k_SH.shape),
                jax.lax.full_like(dq_iHR, 0, jnp.float32, v_SW.shape),
            )
            dq_iHR, dk_SH, dv_SW = jax.lax.fori_loop(first_Bj[b, j], end_Bj[b, j], add_queries, start)
            return dq_iHR, (dk_SH.astype(k.dtype), dv_SW.astype(v.dtype))

        start = jax.lax.full_like(q, 0, jnp.float32, (blocks, H, R))
        dq_iHR, (dk_jSH, dv_jSW) = jax.lax.scan(of_keys, start, jnp.arange(layout.key_blocks))
        # The scores were computed from scaled queries, so dk is complete and only dq still needs the scale.
        return (dq_iHR * scale).astype(q.dtype), dk_jSH, dv_jSW

    dq, dk, dv = jax.lax.map(of_head, jnp.arange(B * K))
    dq_BtNH = _from_query_blocks(dq.reshape(B, K, blocks, H, R), layout, t)
    dk_BTKH = _from_key_blocks(dk.reshape(B, K, *dk.shape[1:]), T)
    dv_BTKW = _from_key_blocks(dv.reshape(B, K, *dv.shape[1:]), T)
    # Segment ids and the device index are integers, which have no gradient.
    return dq_BtNH, dk_BTKH, dv_BTKW, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)
