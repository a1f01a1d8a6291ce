"""The grouped-query layer: queries are scaled by position, keys are not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.attention import rope
from moe_train.model.attention.gqa import GroupedQueryAttention
from moe_train.model.attention.places import TokenPlaces
from tests.tiny import ATTENTION, MIXTRAL, ONE


def test_query_scaling_changes_tokens_from_the_original_length_on() -> None:
    T = 12
    scaling = config.QueryScaling(beta=0.5, original_max_seq_len=8)
    x = np.random.default_rng(0).normal(size=(1, T, MIXTRAL.model_dim)).astype(np.float32)
    positions, segments = np.arange(T, dtype=np.int32)[None], np.ones((1, T), np.int32)

    def output(attention: config.GroupedQueryAttention) -> Any:
        layer = GroupedQueryAttention(nnx.Rngs(0), MIXTRAL, attention, config.Compute(attention="reference"), None)

        def apply(x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
            rotation = rope.rotation(positions, MIXTRAL.rope, attention.rotated_dims)
            return layer(x, TokenPlaces(positions, segments), rotation)[0]

        return jax.jit(apply)(*put_batch((x, positions, segments), ONE))

    with jax.set_mesh(ONE):
        plain, scaled = (jax.device_get(output(a)) for a in (ATTENTION, ATTENTION.model_copy(update={"query_scaling": scaling})))
    np.testing.assert_array_equal(plain[:, :8], scaled[:, :8])
    assert (plain[:, 8:] != scaled[:, 8:]).any(axis=-1).all()
