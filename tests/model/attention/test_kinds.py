"""The module of each kind of attention, and its cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_train import config
from moe_train.model.attention.gqa import GroupedQueryAttention, KeyValueCache
from moe_train.model.attention.kinds import attention_layer, empty_cache
from moe_train.model.attention.mla import LatentCache, MultiHeadLatentAttention
from tests.tiny import ATTENTION, LATENT, MISTRAL4, MIXTRAL, ONE


@pytest.mark.parametrize(("model", "kind"), [(MIXTRAL, GroupedQueryAttention), (MISTRAL4, MultiHeadLatentAttention)])
def test_the_layer_of_a_kind(model: config.Model, kind: type) -> None:
    with jax.set_mesh(ONE):
        layer = jax.eval_shape(lambda: attention_layer(nnx.Rngs(0), model, config.Compute(), None))
    assert type(layer) is kind


def test_a_cache_has_the_key_heads_or_the_latents_of_each_repeat() -> None:
    with jax.set_mesh(ONE):
        keys, latents = (empty_cache(section, 3, 1, 5, jnp.dtype("float32")) for section in (ATTENTION, LATENT))
    assert isinstance(keys, KeyValueCache) and isinstance(latents, LatentCache)
    assert keys.k_BKHS.shape == (3, 1, 2, 6, 5)
    assert keys.v_BKSH.shape == (3, 1, 2, 5, 6)
    assert latents.latents_BKSC.shape == (3, 1, 1, 5, 14 + 8)
