"""Writing to a cache and attending to it: slot s of a sequence holds position s, and later slots are masked by causality.

Keys are stored as (B, K, H, S) and values as (B, K, S, W), so that both products of a decoded token read each head's entries in
the order of memory: on CPUs, other layouts are copied for each token.

Local view inside `shard_map`, where the mesh axis `context` splits the slots. Each device writes what falls into its part, and
the softmax is taken over the slots of all devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import BATCH
from moe_train.model.attention.blocked import NEG
from moe_train.model.attention.kernels import attention_mask
from moe_train.model.sharding.collectives import gather_axis, reduce_scatter_axis


def key_spec(heads: str | None) -> P:
    """Return the partition spec of cached keys (B, K, H, S), whose heads a mesh axis splits, or none."""
    return P(BATCH, heads, None, "context")


def value_spec(heads: str | None) -> P:
    """Return the partition spec of cached values (B, K, S, W), whose heads a mesh axis splits, or none."""
    return P(BATCH, heads, "context", None)


def extend_keys(
    slots_BKHS: Float[Array, "B K H S"], new_BTKH: Float[Array, "B T K H"], positions_BT: Int[Array, "B T"], heads: str | None
) -> Float[Array, "B K H S"]:
    """Write the keys of further tokens into the slots of their positions.

    Args:
        slots_BKHS: the cache.
        new_BTKH: keys of further tokens.
        positions_BT: positions of these tokens; a token with position -1 is not written.
        heads: mesh axis that splits the heads, or None.
    """

    def local(
        slots: Float[Array, "b k H s"], new: Float[Array, "b t k H"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b k H s"]:
        new, slot = _with_slots(new, positions, slots.shape[3])
        if slot.shape == (1, 1):
            return _with_entry(slots, new[0, 0, :, :, None].astype(slots.dtype), slot[0, 0], 2)
        return slots.at[jnp.arange(slots.shape[0])[:, None], :, :, slot].set(new.astype(slots.dtype), mode="drop")

    spec = key_spec(heads)
    run = jax.shard_map(local, in_specs=(spec, _new_spec(heads), P(BATCH, "context")), out_specs=spec)
    return run(slots_BKHS, new_BTKH, positions_BT)


def extend_values(
    slots_BKSW: Float[Array, "B K S W"], new_BTKW: Float[Array, "B T K W"], positions_BT: Int[Array, "B T"], heads: str | None
) -> Float[Array, "B K S W"]:
    """Write the values, or the latents, of further tokens into the slots of their positions, as `extend_keys` does."""

    def local(
        slots: Float[Array, "b k s W"], new: Float[Array, "b t k W"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b k s W"]:
        new, slot = _with_slots(new, positions, slots.shape[2])
        if slot.shape == (1, 1):
            return _with_entry(slots, new[0, 0, :, None].astype(slots.dtype), slot[0, 0], 1)
        return slots.at[jnp.arange(slots.shape[0])[:, None], :, slot].set(new.astype(slots.dtype), mode="drop")

    spec = value_spec(heads)
    run = jax.shard_map(local, in_specs=(spec, _new_spec(heads), P(BATCH, "context")), out_specs=spec)
    return run(slots_BKSW, new_BTKW, positions_BT)


def _with_entry(
    slots: Float[Array, "1 K m n"], entry: Float[Array, "K ..."], slot: Int[Array, ""], axis: int
) -> Float[Array, "1 K m n"]:
    """Return the cache of a single sequence with one more entry, written without the dim of sequences.

    XLA:CPU takes a dim of one for a change of shape, and copies the whole cache for it at each token.

    Args:
        slots: the cache.
        entry: the entry, with a dim of one for the slots.
        slot: its place; past the end if it is not written.
        axis: index of the dim of slots in `entry`.
    """
    cache = slots[0]
    old = jax.lax.dynamic_slice_in_dim(cache, slot, 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(cache, jnp.where(slot < cache.shape[axis], entry, old), slot, axis)[None]


def _per_head(x_bKRn: Float[Array, "b K R n"], y_bKnm: Float[Array, "b K n m"]) -> Float[Array, "b K R m"]:
    """Return the products for each sequence and head in float32, for a single sequence without its dim, as in `_with_entry`."""
    if x_bKRn.shape[0] == 1:
        return jax.lax.dot_general(x_bKRn[0], y_bKnm[0], (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)[None]
    return jax.lax.dot_general(x_bKRn, y_bKnm, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _new_spec(heads: str | None) -> P:
    """Return the partition spec of new entries (B, T, K, W)."""
    return P(BATCH, "context", heads, None)


def _with_slots(
    new: Float[Array, "b t k W"], positions: Int[Array, "b t"], slots: int
) -> tuple[Float[Array, "b T k W"], Int[Array, "b T"]]:
    """Return the new entries of all devices of `context`, and the slot of each among the `slots` of this device. Local view.

    `context` splits the new tokens by their place in x but the slots by position, so any device may own any token's slot.
    """
    new = gather_axis(new, "context", 1)
    slot = gather_axis(positions, "context", 1) - jax.lax.axis_index("context") * slots
    # Positions of other devices get an index past the end, which `mode="drop"` skips; a negative one would wrap around.
    return new, jnp.where((slot < 0) | (slot >= slots), slots, slot)


def attend_slots(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSW: Float[Array, "B K S W"],
    positions_BT: Int[Array, "B T"],
    window: int | None,
    heads: str | None,
) -> Float[Array, "B T N W"]:
    """Attend to the keys and values of a cache.

    Args:
        q_BTNH: queries; scores are divided by the square root of H.
        k_BKHS: cached keys.
        v_BKSW: cached values.
        positions_BT: positions of the queries.
        window: sliding window in tokens; None for full causal attention.
        heads: mesh axis that splits the heads of keys and values, or None. Queries are split over `tensor` by N.
    """

    def local(
        q: Float[Array, "b t n H"], k: Float[Array, "b k H s"], v: Float[Array, "b k s W"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t n W"]:
        local_shape = (*q.shape[:-1], v.shape[-1])
        # Queries of all devices meet each device's slots; the outputs are summed and scattered back at the end.
        q = gather_axis(q, "context", 1)
        positions = gather_axis(positions, "context", 1)
        b, t, n, H = q.shape
        K = k.shape[1]
        S = v.shape[2]
        slots = jnp.broadcast_to(jax.lax.axis_index("context") * S + jnp.arange(S), (b, S))
        # A row of the cache is one sequence and slot s holds position s, so causality alone masks, without segment ids.
        visible = attention_mask(positions, slots, None, None, window)
        G = n // K
        # The queries that share a head of keys are the rows of one product. `einsum` would swap the operands.
        q_bKRH = q.reshape(b, t, K, G, H).transpose(0, 2, 3, 1, 4).reshape(b, K, G * t, H)
        scores_bKRS = _per_head(q_bKRH, k) / math.sqrt(H)
        scores = jnp.where(visible[:, None, None], scores_bKRS.reshape(b, K, G, t, S), NEG)
        # Maximum and sum are reduced over `context`, so that the softmax is normalized over the slots of all devices.
        weights = jnp.exp(scores - jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), "context"))
        weights /= jax.lax.psum(jnp.sum(weights, axis=-1, keepdims=True), "context")
        weights_bKRS = weights.reshape(b, K, G * t, S).astype(v.dtype)
        y_bKRW = _per_head(weights_bKRS, v)
        y = y_bKRW.reshape(b, K, G, t, v.shape[3]).transpose(0, 3, 1, 2, 4)
        return reduce_scatter_axis(y, "context", 1).reshape(local_shape).astype(q.dtype)

    queries = P(BATCH, "context", "tensor", None)
    specs = (queries, key_spec(heads), value_spec(heads), P(BATCH, "context"))
    return jax.shard_map(local, in_specs=specs, out_specs=queries)(q_BTNH, k_BKHS, v_BKSW, positions_BT)
