"""The module of each kind of attention, and its cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_train import config
from moe_train.model.attention.gqa import GroupedQueryAttention
from moe_train.model.attention.kinds import attention_class
from tests.tiny import ONE


def test_attention_without_a_name_is_grouped_query_attention() -> None:
    section = config.GroupedQueryAttention.model_validate({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8})
    assert attention_class(section) is GroupedQueryAttention


def test_a_cache_has_the_key_heads_of_each_repeat() -> None:
    section = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
    with jax.set_mesh(ONE):
        cache = attention_class(section).empty_cache(section, num_layers=3, batch_size=1, max_len=5, dtype=jnp.dtype("float32"))
    assert cache.k_BSKH.shape == cache.v_BSKH.shape == (3, 1, 5, 2, 8)
