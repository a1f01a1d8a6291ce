"""Attention in plain XLA, for CPUs and wherever no other kernel fits: blocks of queries against the keys before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_train.model.attention.context_parallel import RunStarts

NEG = -1e30
"""Score of a masked pair. It is finite, so that a row without any visible key stays finite."""


def heads_first(x_BTNH: Float[Array, "B T N H"], K: int) -> Float[Array, "B K G T H"]:
    """Transpose (B, T, N, H) to (B, K, G, T, H): query heads are grouped by key head and each head's sequence is contiguous."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


class SegmentIds(NamedTuple):
    """Segment ids of queries and keys; a query sees only keys with its own id."""

    queries_Bt: Int[Array, "B t"]
    keys_BT: Int[Array, "B T"]


@dataclass(frozen=True)
class CausalWindow:
    """The static part of the mask: where the queries of each device stand in the sequence, and how far back they see."""

    run_starts: RunStarts
    """Positions where the runs of queries of each device of `context` start."""
    window: int | None
    """A query sees only keys less than `window` positions before it; None for no limit."""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blocked_attention(
    q_BtNH: Float[Array, "B t N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    segment_ids: SegmentIds,
    device: Int[Array, ""],
    causal: CausalWindow,
) -> Float[Array, "B t N W"]:
    """Compute attention one sequence and one block of queries at a time; the masked half is never computed.

    The backward pass recomputes the weights from the saved log-sum-exp (FlashAttention-2, arXiv:2307.08691).

    Args:
        q_BtNH: queries, in runs that start at the positions `causal.run_starts[device]`.
        k_BTKH: keys of the full sequence.
        v_BTKW: values of the full sequence.
        segment_ids: segment ids of the queries and of the keys.
        device: index of this device on `context`.
        causal: positions of the queries and window; static.

    Returns:
        The attention output (B, t, N, W), in the order of the queries.
    """
    return _blocked_forward(q_BtNH, k_BTKH, v_BTKW, segment_ids, device, causal)[0]


class _Residuals(NamedTuple):
    """Arrays that the forward pass saves for the backward pass."""

    q_BtNH: Float[Array, "B t N H"]
    k_BTKH: Float[Array, "B T K H"]
    v_BTKW: Float[Array, "B T K W"]
    segment_ids: SegmentIds
    device: Int[Array, ""]
    y_BtNW: Float[Array, "B t N W"]
    lse_BKGt1: Float[Array, "B K G t 1"]


class _Sequence(NamedTuple):
    """Inputs of one sequence, heads first; with a leading dim B, of all sequences."""

    q_KGtH: Float[Array, "*B K G t H"]
    """Queries, scaled by 1 / sqrt(H)."""
    k_KTH: Float[Array, "*B K T H"]
    v_KTW: Float[Array, "*B K T W"]
    segments_t: Int[Array, "*B t"]
    segments_T: Int[Array, "*B T"]


class _Span(NamedTuple):
    """A block of queries: rows `start` to `end`, the first of them at `position`, and the position of the `first` visible key."""

    start: int
    end: int
    position: int
    first: int

    @property
    def queries(self) -> slice:
        """Rows of the queries."""
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        """Rows of the keys that the block can see."""
        return slice(self.first, self.position + self.end - self.start)


def _spans(t: int, T: int, starts: tuple[int, ...], window: int | None) -> list[_Span]:
    """Split t local queries into blocks, about 16 for all T queries over all devices, so that compile time stays short."""
    block = max(128, -(-T // 16))
    # A device has one run of queries, or two if `context` splits the sequence (zig-zag order).
    run = t // len(starts)
    spans = []
    for i, position in enumerate(starts):
        for at in range(0, run, block):
            # The first query of a block sees furthest back; `_mask` hides from the later ones what only it sees.
            first = 0 if window is None else max(0, position + at - window + 1)
            spans.append(_Span(i * run + at, i * run + min(at + block, run), position + at, first))
    return spans


def _mask(span: _Span, sequence: _Sequence, window: int | None) -> Bool[Array, "b s"]:
    """Return the mask of a block of queries that is True where the query sees the key."""
    t = jnp.arange(span.position, span.keys.stop)[:, None]
    s = jnp.arange(span.first, span.keys.stop)[None, :]
    visible = (t >= s) & (sequence.segments_t[span.queries, None] == sequence.segments_T[None, span.keys])
    return visible if window is None else visible & (t - s < window)


def _over_sequences(of_sequence: Callable[..., Any], device: Int[Array, ""], starts: RunStarts, arrays: Any) -> Any:
    """Apply `of_sequence(starts of this device, arrays of one sequence)` to each sequence in turn.

    The starts must be static, so there is one branch for each device.
    """
    # `own=own` binds this device's starts; a plain closure would give every branch those of the last device.
    branches = [lambda arrays, own=own: jax.lax.map(partial(of_sequence, own), arrays) for own in starts]
    return branches[0](arrays) if len(starts) == 1 else jax.lax.switch(device, branches, arrays)


def _blocked_forward(
    q_BtNH: Float[Array, "B t N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    segment_ids: SegmentIds,
    device: Int[Array, ""],
    causal: CausalWindow,
) -> tuple[Float[Array, "B t N W"], _Residuals]:
    B, t, N, H = q_BtNH.shape
    T, K = k_BTKH.shape[1:3]
    q = heads_first(q_BtNH, K) * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    k = k_BTKH.transpose(0, 2, 1, 3)
    v = v_BTKW.transpose(0, 2, 1, 3)

    def of_sequence(starts: tuple[int, ...], sequence: _Sequence) -> tuple[Float[Array, "K G t W"], Float[Array, "K G t 1"]]:
        ys = []
        lses = []
        for span in _spans(t, T, starts, causal.window):
            visible = _mask(span, sequence, causal.window)
            q_b = sequence.q_KGtH[:, :, span.queries]
            k_b = sequence.k_KTH[:, span.keys]
            v_b = sequence.v_KTW[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            scores = jnp.where(visible, scores, NEG)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            y = jnp.einsum("KGTS,KSW->KGTW", weights.astype(v_b.dtype), v_b, preferred_element_type=jnp.float32)
            # Normalizing y costs less than normalizing the weights: W entries per query instead of T.
            ys.append((y / total).astype(q_b.dtype))
            lses.append(top + jnp.log(total))
        return jnp.concatenate(ys, axis=2), jnp.concatenate(lses, axis=2)

    y, lse = _over_sequences(of_sequence, device, causal.run_starts, _Sequence(q, k, v, *segment_ids))
    # Both residuals are named: if only y were saved, the backward pass would compute all scores again for the log-sum-exp.
    lse = checkpoint_name(lse, "attention")
    y_BtNW = checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(B, t, N, v_BTKW.shape[-1]), "attention")
    return y_BtNW, _Residuals(q_BtNH, k_BTKH, v_BTKW, segment_ids, device, y_BtNW, lse)


def _blocked_backward(
    causal: CausalWindow, saved: _Residuals, dy_BtNW: Float[Array, "B t N W"]
) -> tuple[Float[Array, "B t N H"], Float[Array, "B T K H"], Float[Array, "B T K W"], None, None]:
    B, t, N, H = saved.q_BtNH.shape
    T, K = saved.k_BTKH.shape[1:3]
    scale = jnp.asarray(1 / math.sqrt(H), saved.q_BtNH.dtype)
    q = heads_first(saved.q_BtNH, K) * scale
    dy = heads_first(dy_BtNW, K)
    k = saved.k_BTKH.transpose(0, 2, 1, 3)
    v = saved.v_BTKW.transpose(0, 2, 1, 3)
    # The row sum of dy * y is the term of the softmax gradient that all entries of a row share.
    common = jnp.sum(dy.astype(jnp.float32) * heads_first(saved.y_BtNW, K).astype(jnp.float32), axis=-1, keepdims=True)

    def of_sequence(
        starts: tuple[int, ...],
        arrays: tuple[_Sequence, Float[Array, "K G t W"], Float[Array, "K G t 1"], Float[Array, "K G t 1"]],
    ) -> tuple[Float[Array, "K G t H"], Float[Array, "K T H"], Float[Array, "K T W"]]:
        sequence, dy_KGtW, lse_KGt1, common_KGt1 = arrays
        dk = jnp.zeros_like(sequence.k_KTH, jnp.float32)
        dv = jnp.zeros_like(sequence.v_KTW, jnp.float32)
        dqs = []
        for span in _spans(t, T, starts, causal.window):
            visible = _mask(span, sequence, causal.window)
            q_b = sequence.q_KGtH[:, :, span.queries]
            dy_b = dy_KGtW[:, :, span.queries]
            k_b = sequence.k_KTH[:, span.keys]
            v_b = sequence.v_KTW[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            # exp may overflow for a masked pair, whose score the log-sum-exp does not contain; the select discards it.
            weights = jnp.where(visible, jnp.exp(scores - lse_KGt1[:, :, span.queries]), 0)
            dweights = jnp.einsum("KGTW,KSW->KGTS", dy_b, v_b, preferred_element_type=jnp.float32)
            # Gradient of the softmax: ds = w * (dw - sum(w * dw)), where the sum is `common`.
            dscores = (weights * (dweights - common_KGt1[:, :, span.queries])).astype(k_b.dtype)
            dqs.append(jnp.einsum("KGTS,KSH->KGTH", dscores, k_b))
            # dk and dv accumulate in float32, because many blocks of queries add to the same keys.
            dk = dk.at[:, span.keys].add(jnp.einsum("KGTS,KGTH->KSH", dscores, q_b, preferred_element_type=jnp.float32))
            weights = weights.astype(dy_b.dtype)
            dv = dv.at[:, span.keys].add(jnp.einsum("KGTS,KGTW->KSW", weights, dy_b, preferred_element_type=jnp.float32))
        # The scores were computed from scaled queries, so dk is complete and only dq still needs the scale.
        return jnp.concatenate(dqs, axis=2) * scale, dk.astype(sequence.k_KTH.dtype), dv.astype(sequence.v_KTW.dtype)

    sequences = _Sequence(q, k, v, *saved.segment_ids)
    dq, dk, dv = _over_sequences(of_sequence, saved.device, causal.run_starts, (sequences, dy, saved.lse_BKGt1, common))
    dq_BtNH = dq.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)
    # Segment ids and the device index are integers, which have no gradient.
    return dq_BtNH, dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)
