"""The grouped-query attention layer and its key-value cache.

A query sees a key of the same segment, or of the prompt that it continues, whose position is not later than its own and, if a
window W is set, less than W before it. Local view: the kernels run inside `shard_map`, where each device has its own sequences
and heads.

Along the mesh axis `context` a device has the queries of its part of the sequence; keys and values are all-gathered (small
under grouped queries), and queries are reordered zig-zag so that causal masking leaves every device equal work
(`context_parallel`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from moe_train import config
from moe_train.model.attention import rope
from moe_train.model.attention.cache import attend_slots, extend_keys, extend_values, key_spec, value_spec
from moe_train.model.attention.kernels import attend
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.query_scaling import query_scale
from moe_train.model.layers import Linear, RandomSource, keys_of
from moe_train.model.sharding.specs import split_axes

_HEADS = "tensor"
"""Mesh axis that splits the heads of keys and values in a cache."""


class KeyValueCache(NamedTuple):
    """Key-value cache: slot s holds position s, and slots past `positions` are masked by causality.

    Outside the loop over layers the arrays have a leading dim L.
    """

    k_BKHS: Float[Array, "*L B K H S"]
    v_BKSH: Float[Array, "*L B K S H"]


class GroupedQueryAttention(nnx.Module):
    """Projections, rotary position embedding and grouped-query attention of one layer.

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        attention: its attention section.
        compute: dtypes and kernels.
        window: sliding window in tokens; None for full causal attention.
    """

    def __init__(
        self,
        rngs: RandomSource,
        model: config.Model,
        attention: config.GroupedQueryAttention,
        compute: config.Compute,
        window: int | None,
    ):
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
        self.query_scaling = attention.query_scaling
        self.window = window
        self.kernel = compute.attention

    @staticmethod
    def empty_cache(
        attention: config.GroupedQueryAttention, num_layers: int, batch_size: int, max_len: int, dtype: jnp.dtype
    ) -> KeyValueCache:
        """Return an empty cache for the `num_layers` layers of one place in the period, stacked on dim 0.

        Args:
            attention: attention section of the model config.
            num_layers: number of layers in the stack that share this place.
            batch_size: number of sequences.
            max_len: largest number of tokens of a sequence.
            dtype: dtype of keys and values.
        """
        K = attention.num_kv_heads
        H = attention.head_dim
        keys = jnp.zeros((num_layers, batch_size, K, H, max_len), dtype, out_sharding=P(None, *key_spec(_HEADS)))
        values = jnp.zeros((num_layers, batch_size, K, max_len, H), dtype, out_sharding=P(None, *value_spec(_HEADS)))
        return KeyValueCache(keys, values)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: TokenPlaces,
        rotation: rope.Rotation,
        cache: KeyValueCache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache | None]:
        """Attend within x, or, with a cache, continue the sequences in the cache with x.

        Args:
            x_BTD: normalized hidden states.
            places: positions and segments of the tokens; with a cache, only positions are used.
            rotation: rotation of all dims of a head by these positions.
            cache: keys and values of earlier positions; None to attend within x only.
            key: PRNG key for the dropout of the adapters; None for no dropout.

        Returns:
            The output (B, T, D), and the cache extended by the keys and values of x, or None without a cache.
        """
        q_key, k_key, v_key, o_key = keys_of(key, 4)
        q_BTNH = rope.rotate(self.q_proj(x_BTD, q_key), rotation)
        k_BTKH = rope.rotate(self.k_proj(x_BTD, k_key), rotation)
        v_BTKH = self.v_proj(x_BTD, v_key)
        if self.query_scaling is not None:
            # One factor per position: it commutes with the rotation, and the keys in a cache stay as they are.
            q_BTNH *= query_scale(self.query_scaling, places.positions_BT).astype(q_BTNH.dtype)
        if cache is None:
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, places, self.window, self.kernel)
        else:
            # Keys enter the cache rotated, so decoding rotates only the new ones.
            keys = extend_keys(cache.k_BKHS, k_BTKH, places.positions_BT, _HEADS)
            values = extend_values(cache.v_BKSH, v_BTKH, places.positions_BT, _HEADS)
            y_BTNH = attend_slots(q_BTNH, keys, values, places.positions_BT, self.window, _HEADS)
            cache = KeyValueCache(keys, values)
            # Summed over N and then W, as they are in memory: XLA:CPU copies no weight for a token. Not in training, where it would
            # then round differently with adapters that add nothing and without, as for the reference of a preference run.
            return self.o_proj(y_BTNH, o_key, "BTNW,NWD->BTD"), cache
        return self.o_proj(y_BTNH, o_key), cache
