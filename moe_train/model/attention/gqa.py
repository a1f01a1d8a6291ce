"""The grouped-query attention layer and its key-value cache.

A query sees a key of the same segment whose position is not later than its own and, if a window W is set, less than W
before it. Local view: the kernels run inside `shard_map`, where each device has its own sequences and heads.

Along the mesh axis `context` a device has the queries of its part of the sequence; keys and values are all-gathered (small
under grouped queries), and queries are reordered zig-zag so that causal masking leaves every device equal work
(`context_parallel`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Shaped

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.attention import rope
from moe_train.model.attention.kernels import attend, attention_mask, attention_scores
from moe_train.model.layers import Linear, keys_of
from moe_train.model.sharding.collectives import gather_axis, reduce_scatter_axis
from moe_train.model.sharding.specs import split_axes


class Cache(NamedTuple):
    """Key-value cache: slot s holds position s, and slots past `positions` are masked by causality.

    Outside the loop over layers the arrays have a leading dim L.
    """

    k_BSKH: Float[Array, "*L B S K H"]
    v_BSKH: Float[Array, "*L B S K H"]


class GroupedQueryAttention(nnx.Module):
    """Projections, rotary position embedding and grouped-query attention of one layer.

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        compute: dtypes and kernels.
        window: sliding window in tokens; None for full causal attention.
    """

    def __init__(self, rngs: nnx.Rngs, model: config.Model, compute: config.Compute, window: int | None):
        attention = config.require_grouped_query(model.attention, "this layer")
        D = model.model_dim
        N = attention.num_heads
        K = attention.num_kv_heads
        H = attention.head_dim
        std = model.init_stddev
        dtype = jnp.dtype(compute.param_dtype)
        kv_spec = P("fsdp", split_axes(K), None)
        self.q_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), P("fsdp", split_axes(N), None), std, dtype)
        self.k_proj = Linear(rngs, "BTD,DKH->BTKH", (D, K, H), kv_spec, std, dtype)
        self.v_proj = Linear(rngs, "BTD,DKH->BTKH", (D, K, H), kv_spec, std, dtype)
        self.o_proj = Linear(rngs, "BTNH,NHD->BTD", (N, H, D), P(split_axes(N), None, "fsdp"), std, dtype)
        self.rope = model.rope
        self.query_scaling = attention.query_scaling
        self.window = window
        self.kernel = compute.attention

    @staticmethod
    def empty_cache(
        attention: config.GroupedQueryAttention, num_layers: int, batch_size: int, max_len: int, dtype: jnp.dtype
    ) -> Cache:
        """Return an empty cache for the `num_layers` layers of one place in the period, stacked on dim 0.

        Args:
            attention: attention section of the model config.
            num_layers: number of layers in the stack that share this place.
            batch_size: number of sequences.
            max_len: largest number of tokens of a sequence.
            dtype: dtype of keys and values.
        """
        shape = (num_layers, batch_size, max_len, attention.num_kv_heads, attention.head_dim)
        spec = P(None, BATCH, "context", "tensor", None)
        keys = jnp.zeros(shape, dtype, out_sharding=spec)
        values = jnp.zeros(shape, dtype, out_sharding=spec)
        return Cache(keys, values)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attend within x, or, with a cache, continue the sequences in the cache with x.

        Args:
            x_BTD: normalized hidden states.
            positions_BT: positions, which restart in each segment.
            segment_ids_BT: packed segments; a query sees only keys of its own segment. Not used with a cache.
            cache: keys and values of earlier positions; None to attend within x only.
            key: PRNG key for the dropout of the adapters; None for no dropout.

        Returns:
            The output (B, T, D), and the cache extended by the keys and values of x, or None without a cache.
        """
        q_key, k_key, v_key, o_key = keys_of(key, 4)
        q_BTNH = rope.rotate(self.q_proj(x_BTD, q_key), positions_BT, self.rope)
        k_BTKH = rope.rotate(self.k_proj(x_BTD, k_key), positions_BT, self.rope)
        v_BTKH = self.v_proj(x_BTD, v_key)
        if self.query_scaling is not None:
            # One factor per position: it commutes with the rotation, and the keys in a cache stay as they are.
            q_BTNH *= _query_scale(self.query_scaling, positions_BT).astype(q_BTNH.dtype)
        if cache is None:
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, self.window, self.kernel)
        else:
            # Keys enter the cache rotated, so decoding rotates only the new ones.
            cache = _extend(cache, k_BTKH, v_BTKH, positions_BT)
            y_BTNH = _attend_cache(q_BTNH, cache, positions_BT, self.window)
        return self.o_proj(y_BTNH, o_key), cache


def _query_scale(scaling: config.QueryScaling, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
    """Return the factor on the queries (B, T, 1, 1): 1 + beta * log(1 + floor(position / original_max_seq_len))."""
    blocks = jnp.maximum(positions_BT, 0) // scaling.original_max_seq_len  # padding may have position -1
    return (1 + scaling.beta * jnp.log1p(blocks.astype(jnp.float32)))[:, :, None, None]


def _extend(
    cache: Cache, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], positions_BT: Int[Array, "B T"]
) -> Cache:
    """Write new keys and values into the slots of their positions; each device writes those that fall into its part."""

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

    def write(slots: Float[Array, "B S K H"], new: Float[Array, "B T K H"]) -> Float[Array, "B S K H"]:
        spec = P(BATCH, "context", "tensor", None)
        return jax.shard_map(local, in_specs=(spec, spec, P(BATCH, "context")), out_specs=spec)(slots, new, positions_BT)

    return Cache(write(cache.k_BSKH, k_BTKH), write(cache.v_BSKH, v_BTKH))


def _first(axis: str, x: Shaped[Array, "..."]) -> Int[Array, ""]:
    """Return the global index of this device's first entry of dim 1, which `axis` splits. Call it inside `shard_map`."""
    return jax.lax.axis_index(axis) * x.shape[1]


def _attend_cache(
    q_BTNH: Float[Array, "B T N H"], cache: Cache, positions_BT: Int[Array, "B T"], window: int | None
) -> Float[Array, "B T N H"]:
    """Attend to the cache. Each device has a part of the slots; the softmax is taken over all of them."""

    def local(
        q: Float[Array, "b t n H"], k: Float[Array, "b s k H"], v: Float[Array, "b s k H"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t n H"]:
        local_shape = q.shape
        # Queries of all devices meet each device's slots; the outputs are summed and scattered back at the end.
        q = gather_axis(q, "context", 1)
        positions = gather_axis(positions, "context", 1)
        slots = jnp.broadcast_to(_first("context", k) + jnp.arange(k.shape[1]), k.shape[:2])
        # A row of the cache is one sequence and slot s holds position s, so causality alone masks, without segment ids.
        scores = attention_scores(q, k, attention_mask(positions, slots, None, None, window))
        # Maximum and sum are reduced over `context`, so that the softmax is normalized over the slots of all devices.
        weights = jnp.exp(scores - jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), "context"))
        weights /= jax.lax.psum(jnp.sum(weights, axis=-1, keepdims=True), "context")
        y = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return reduce_scatter_axis(y, "context", 1).reshape(local_shape).astype(q.dtype)

    spec = P(BATCH, "context", "tensor", None)
    return jax.shard_map(local, in_specs=(spec, spec, spec, P(BATCH, "context")), out_specs=spec)(q_BTNH, *cache, positions_BT)
