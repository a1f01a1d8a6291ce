"""Writing to a cache: each token goes to the slot of its position, padding nowhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.attention.cache import extend_keys, extend_values, key_spec, value_spec
from tests.meshes import mesh_of


@pytest.mark.parametrize("context", [1, 2])
def test_tokens_go_to_the_slots_of_their_positions(context: int) -> None:
    mesh = mesh_of(config.Mesh(context=context))
    slots = np.full((1, 1, 8, 2), -1.0, np.float32)
    new = np.arange(8, dtype=np.float32).reshape(1, 4, 1, 2)
    positions = np.array([[5, 0, -1, 3]], np.int32)

    def put(x: np.ndarray, *spec: object) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        tokens = put(new, BATCH, "context", None, None), put(positions, BATCH, "context")
        values = extend_values(put(slots, *value_spec(None)), *tokens, None)
        keys = extend_keys(put(slots.swapaxes(2, 3), *key_spec(None)), *tokens, None)
    expected = slots.copy()
    expected[0, 0, [5, 0, 3]] = new[0, [0, 1, 3], 0]
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.swapaxes(keys, 2, 3), expected)
