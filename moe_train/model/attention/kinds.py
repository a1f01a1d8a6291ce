"""Selection of the module that computes each kind of attention in the config."""

from __future__ import annotations

from typing import assert_never

from moe_train import config
from moe_train.model.attention.gqa import GroupedQueryAttention


def attention_class(attention: config.Attention) -> type[GroupedQueryAttention]:
    """Return the attention module class: call it as `cls(rngs, model, compute, window)`; it also has `empty_cache`."""
    match attention:
        case config.GroupedQueryAttention():
            return GroupedQueryAttention
        case config.MultiHeadLatentAttention():
            raise ValueError("the model is not supported for multi-head latent attention (attention.name mla) yet")
        case _:
            assert_never(attention)
