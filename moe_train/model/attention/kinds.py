"""Selection of the module that computes each kind of attention in the config, and of its cache."""

from __future__ import annotations

from typing import assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_train import config
from moe_train.model.attention.gqa import GroupedQueryAttention, KeyValueCache
from moe_train.model.attention.mla import LatentCache, MultiHeadLatentAttention
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.rope import Rotation
from moe_train.model.layers import RandomSource

AttentionLayer = GroupedQueryAttention | MultiHeadLatentAttention
"""The attention module of a layer."""
Cache = KeyValueCache | LatentCache
"""What decoding keeps of earlier positions of one layer."""


def attention_layer(rngs: RandomSource, model: config.Model, compute: config.Compute, window: int | None) -> AttentionLayer:
    """Initialize the attention of one layer.

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        compute: dtypes and kernels.
        window: sliding window in tokens; None for full causal attention.
    """
    match model.attention:
        case config.GroupedQueryAttention() as attention:
            return GroupedQueryAttention(rngs, model, attention, compute, window)
        case config.MultiHeadLatentAttention() as attention:
            return MultiHeadLatentAttention(rngs, model, attention, compute)
        case _:
            assert_never(model.attention)


def apply_attention(
    layer: AttentionLayer,
    x_BTD: Float[Array, "B T D"],
    places: TokenPlaces,
    rotation: Rotation,
    cache: Cache | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Apply the attention of one layer, whose cache, if there is one, is of the layer's own kind."""
    match layer:
        case GroupedQueryAttention():
            assert cache is None or isinstance(cache, KeyValueCache)
            return layer(x_BTD, places, rotation, cache, key)
        case MultiHeadLatentAttention():
            assert cache is None or isinstance(cache, LatentCache)
            return layer(x_BTD, places, rotation, cache, key)
        case _:
            assert_never(layer)


def empty_cache(attention: config.Attention, num_layers: int, batch_size: int, max_len: int, dtype: jnp.dtype) -> Cache:
    """Return an empty cache for the `num_layers` layers of one place in the period, stacked on dim 0.

    Args:
        attention: attention section of the model config.
        num_layers: number of layers in the stack that share this place.
        batch_size: number of sequences.
        max_len: largest number of tokens of a sequence.
        dtype: dtype of what is cached.
    """
    match attention:
        case config.GroupedQueryAttention():
            return GroupedQueryAttention.empty_cache(attention, num_layers, batch_size, max_len, dtype)
        case config.MultiHeadLatentAttention():
            return MultiHeadLatentAttention.empty_cache(attention, num_layers, batch_size, max_len, dtype)
        case _:
            assert_never(attention)
