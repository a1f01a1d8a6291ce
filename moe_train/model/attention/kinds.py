"""Which module computes each kind of attention of the config."""

from __future__ import annotations

from typing import assert_never

from moe_train import config
from moe_train.model.attention.gqa import GroupedQueryAttention


def attention_class(attention: config.Attention) -> type[GroupedQueryAttention]:
    """The module of a kind of attention: `cls(rngs, model, compute, window)`, and its `empty_cache`."""
    match attention:
        case config.GroupedQueryAttention():
            return GroupedQueryAttention
        case _:
            assert_never(attention)
