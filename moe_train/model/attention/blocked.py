"""Attention in plain XLA, for CPUs and wherever no other kernel fits: blocks of queries against the keys before them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NEG = -1e30
"""Score of a masked pair. It is finite, so that a row without any visible key stays finite."""


def heads_first(x_BTNH: jax.Array, K: int) -> jax.Array:
    """Transpose (B, T, N, H) to (B, K, G, T, H): query heads are grouped by key head and each head's sequence is contiguous."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


Parts = tuple[tuple[int, ...], ...]
"""For each device of `context`, the positions where its runs of queries start (`context_parallel.parts`)."""


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def blocked(
    q_BtNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_Bt: jax.Array,
    segments_BT: jax.Array,
    part: jax.Array,
    parts: Parts,
    window: int | None,
) -> jax.Array:
    """Compute attention one sequence and one block of queries at a time; the masked half is never computed.

    The backward pass recomputes the weights from the saved log-sum-exp (FlashAttention-2, arXiv:2307.08691).

    Args:
        q_BtNH: queries, in runs that start at the positions parts[part].
        k_BTKH: keys of the full sequence.
        v_BTKH: values of the full sequence.
        segments_Bt: segment ids of the queries.
        segments_BT: segment ids of the keys.
        part: scalar index of this device on `context`.
        parts: start positions of the runs of each device; static.
        window: a query sees only keys less than `window` positions before it; None for no limit.

    Returns:
        The attention output (B, t, N, H), in the order of the queries.
    """
    return _blocked_forward(q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, parts, window)[0]


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
    block, run = max(128, -(-T // 16)), t // len(starts)
    spans = []
    for i, position in enumerate(starts):
        for at in range(0, run, block):
            first = 0 if window is None else max(0, position + at - window + 1)
            spans.append(_Span(i * run + at, i * run + min(at + block, run), position + at, first))
    return spans


def _mask(span: _Span, segments_t: jax.Array, segments_T: jax.Array, window: int | None) -> jax.Array:
    t = jnp.arange(span.position, span.keys.stop)[:, None]
    s = jnp.arange(span.first, span.keys.stop)[None, :]
    seen = (t >= s) & (segments_t[span.queries, None] == segments_T[None, span.keys])
    return seen if window is None else seen & (t - s < window)


def _over_sequences(sequence: Any, part: jax.Array, parts: Parts, arrays: tuple[jax.Array, ...]) -> Any:
    """Apply `sequence(starts, arrays of one sequence)` to each sequence in turn.

    `starts` must be static, so there is one branch for each device's part.
    """
    branches = [lambda arrays, starts=starts: jax.lax.map(partial(sequence, starts), arrays) for starts in parts]
    return branches[0](arrays) if len(parts) == 1 else jax.lax.switch(part, branches, arrays)


def _blocked_forward(q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, parts, window):
    B, t, N, H = q_BtNH.shape
    T, K = k_BTKH.shape[1:3]
    q = heads_first(q_BtNH, K) * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)

    def sequence(starts, arrays):
        q_KGtH, k_KTH, v_KTH, segments_t, segments_T = arrays
        ys, lses = [], []
        for span in _spans(t, T, starts, window):
            seen = _mask(span, segments_t, segments_T, window)
            q_b, k_b, v_b = q_KGtH[:, :, span.queries], k_KTH[:, span.keys], v_KTH[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            scores = jnp.where(seen, scores, NEG)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            y = jnp.einsum("KGTS,KSH->KGTH", weights.astype(v_b.dtype), v_b, preferred_element_type=jnp.float32)
            ys.append((y / total).astype(q_b.dtype))
            lses.append(top + jnp.log(total))
        return jnp.concatenate(ys, axis=2), jnp.concatenate(lses, axis=2)

    y, lse = _over_sequences(sequence, part, parts, (q, k, v, segments_Bt, segments_BT))
    lse = checkpoint_name(lse, "attention")
    y_BtNH = checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H), "attention")
    return y_BtNH, (q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, y_BtNH, lse)


def _blocked_backward(parts, window, saved, dy_BtNH):
    q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, y_BtNH, lse = saved
    B, t, N, H = q_BtNH.shape
    T, K = k_BTKH.shape[1:3]
    scale = jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    q, dy = heads_first(q_BtNH, K) * scale, heads_first(dy_BtNH, K)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    # The row sum of dy * y is the term of the softmax gradient that all entries of a row share.
    common = jnp.sum(dy.astype(jnp.float32) * heads_first(y_BtNH, K).astype(jnp.float32), axis=-1, keepdims=True)

    def sequence(starts, arrays):
        q_KGtH, k_KTH, v_KTH, segments_t, segments_T, dy_KGtH, lse_KGt1, common_KGt1 = arrays
        dk = jnp.zeros_like(k_KTH, jnp.float32)
        dv = jnp.zeros_like(v_KTH, jnp.float32)
        dqs = []
        for span in _spans(t, T, starts, window):
            seen = _mask(span, segments_t, segments_T, window)
            q_b, dy_b = q_KGtH[:, :, span.queries], dy_KGtH[:, :, span.queries]
            k_b, v_b = k_KTH[:, span.keys], v_KTH[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            weights = jnp.where(seen, jnp.exp(scores - lse_KGt1[:, :, span.queries]), 0)
            dweights = jnp.einsum("KGTH,KSH->KGTS", dy_b, v_b, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - common_KGt1[:, :, span.queries])).astype(k_b.dtype)
            dqs.append(jnp.einsum("KGTS,KSH->KGTH", dscores, k_b))
            # dk and dv accumulate in float32, because many blocks of queries add to the same keys.
            dk = dk.at[:, span.keys].add(jnp.einsum("KGTS,KGTH->KSH", dscores, q_b, preferred_element_type=jnp.float32))
            weights = weights.astype(dy_b.dtype)
            dv = dv.at[:, span.keys].add(jnp.einsum("KGTS,KGTH->KSH", weights, dy_b, preferred_element_type=jnp.float32))
        return jnp.concatenate(dqs, axis=2) * scale, dk.astype(k_KTH.dtype), dv.astype(v_KTH.dtype)

    dq, dk, dv = _over_sequences(sequence, part, parts, (q, k, v, segments_Bt, segments_BT, dy, lse, common))
    return dq.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None, None, None


blocked.defvjp(_blocked_forward, _blocked_backward)
