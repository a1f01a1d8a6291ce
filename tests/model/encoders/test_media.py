"""Shardings of patches and chunks, and features in the place of embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.encoders.media import Media, write_features
from tests.meshes import mesh_of


@pytest.mark.parametrize("mesh", [config.Mesh(), config.Mesh(fsdp=2, context=4)])
def test_features_and_their_gradients_on_any_mesh(mesh: config.Mesh) -> None:
    draw = np.random.default_rng(0)
    x, dy = (draw.normal(size=(2, 16, 3)).astype(np.float32) for _ in range(2))
    features = draw.normal(size=(2, 8, 3)).astype(np.float32)
    index = np.full((2, 16), -1, np.int32)
    index[0, 3:7] = np.arange(4)
    index[1, [0, 15]] = (7, 2)
    expected = x.copy()
    expected[index >= 0] = np.take_along_axis(features, np.maximum(index, 0)[..., None], axis=1)[index >= 0]
    with jax.set_mesh(mesh_of(mesh)) as _:
        placed = put_batch((x, features, index, dy), mesh_of(mesh))

        def loss(x: jax.Array, features: jax.Array) -> jax.Array:
            return jnp.sum(write_features(x, features, placed[2]) * placed[3])

        assert np.array_equal(write_features(*placed[:3]), expected)
        dx, dfeatures = jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed[:2])
    assert np.array_equal(dx, np.where((index >= 0)[..., None], 0, dy))
    total = np.zeros_like(features)
    for row, column in np.argwhere(index >= 0):
        total[row, index[row, column]] += dy[row, column]
    assert np.allclose(dfeatures, total, atol=1e-6)


@pytest.mark.parametrize("unit", [(12,), (32, 8)])
def test_units_are_split_over_context(unit: tuple[int, ...]) -> None:
    with jax.set_mesh(mesh_of(config.Mesh(data=2, context=2, fsdp=2))):
        arrays: tuple[Any, ...] = (np.zeros((4, 4, *unit)), np.zeros((4, 4, 2), np.int32))
        ids = np.zeros((4, 4), np.int32)
        media = Media(arrays[0], arrays[1], ids, ids).placed()  # type: ignore[arg-type]
        for array in media:
            assert array.addressable_shards[0].data.shape == (1, 2, *array.shape[2:])
