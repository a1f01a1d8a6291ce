"""Writing to a cache and attending to it: slot s of a sequence holds position s, and later slots are masked by causality.

Local view inside `shard_map`, where the mesh axis `context` splits the slots. Each device writes what falls into its part, and
the softmax is taken over the slots of all devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from moe_train.machine.mesh import BATCH
from moe_train.model.attention.kernels import attention_mask, attention_scores
from moe_train.model.sharding.collectives import gather_axis, reduce_scatter_axis


def extend(
    slots_BSKH: Float[Array, "B S K H"], new_BTKH: Float[Array, "B T K H"], positions_BT: Int[Array, "B T"], spec: P
) -> Float[Array, "B S K H"]:
    """Write new entries into the slots of their positions.

    Args:
        slots_BSKH: the cache.
        new_BTKH: keys, values or latents of further tokens.
        positions_BT: positions of these tokens; a token with position -1 is not written.
        spec: partition spec of the cache, which is that of the new entries too.
    """

    def local(
        slots: Float[Array, "b s k H"], new: Float[Array, "b t k H"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b s k H"]:
        # `context` splits the new tokens by their place in x but the slots by position, so any device may own any token's slot.
        new = gather_axis(new, "context", 1)
        positions = gather_axis(positions, "context", 1)
        slot = positions - _first("context", slots)
        # Positions of other devices get an index past the end, which `mode="drop"` skips; a negative one would wrap around.
        slot = jnp.where((slot < 0) | (slot >= slots.shape[1]), slots.shape[1], slot)
        rows = jnp.arange(slots.shape[0])[:, None]
        return slots.at[rows, slot].set(new.astype(slots.dtype), mode="drop")

    run = jax.shard_map(local, in_specs=(spec, spec, P(BATCH, "context")), out_specs=spec)
    return run(slots_BSKH, new_BTKH, positions_BT)


def _first(axis: str, x: Shaped[Array, "..."]) -> Int[Array, ""]:
    """Return the global index of this device's first entry of dim 1, which `axis` splits. Call it inside `shard_map`."""
    return jax.lax.axis_index(axis) * x.shape[1]


def attend_slots(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKW: Float[Array, "B S K W"],
    positions_BT: Int[Array, "B T"],
    window: int | None,
    spec: P,
) -> Float[Array, "B T N W"]:
    """Attend to the keys and values of a cache.

    Args:
        q_BTNH: queries; scores are divided by the square root of H.
        k_BSKH: cached keys.
        v_BSKW: cached values.
        positions_BT: positions of the queries.
        window: sliding window in tokens; None for full causal attention.
        spec: partition spec of keys and values. Queries are split over `tensor` by N.
    """

    def local(
        q: Float[Array, "b t n H"], k: Float[Array, "b s k H"], v: Float[Array, "b s k W"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t n W"]:
        local_shape = (*q.shape[:-1], v.shape[-1])
        # Queries of all devices meet each device's slots; the outputs are summed and scattered back at the end.
        q = gather_axis(q, "context", 1)
        positions = gather_axis(positions, "context", 1)
        slots = jnp.broadcast_to(_first("context", k) + jnp.arange(k.shape[1]), k.shape[:2])
        # A row of the cache is one sequence and slot s holds position s, so causality alone masks, without segment ids.
        scores = attention_scores(q, k, attention_mask(positions, slots, None, None, window))
        # Maximum and sum are reduced over `context`, so that the softmax is normalized over the slots of all devices.
        weights = jnp.exp(scores - jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), "context"))
        weights /= jax.lax.psum(jnp.sum(weights, axis=-1, keepdims=True), "context")
        y = jnp.einsum("BKGTS,BSKW->BTKGW", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return reduce_scatter_axis(y, "context", 1).reshape(local_shape).astype(q.dtype)

    queries = P(BATCH, "context", "tensor", None)
    run = jax.shard_map(local, in_specs=(queries, spec, spec, P(BATCH, "context")), out_specs=queries)
    return run(q_BTNH, k_BSKH, v_BSKW, positions_BT)
