"""Writing to a cache: each token goes to the slot of its position, padding nowhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.attention.cache import extend
from tests.meshes import mesh_of

SPEC = P(BATCH, "context", None, None)


@pytest.mark.parametrize("context", [1, 2])
def test_tokens_go_to_the_slots_of_their_positions(context: int) -> None:
    mesh = mesh_of(config.Mesh(context=context))
    slots = np.full((1, 8, 1, 2), -1.0, np.float32)
    new = np.arange(8, dtype=np.float32).reshape(1, 4, 1, 2)
    positions = np.array([[5, 0, -1, 3]], np.int32)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in (slots, new)]
        extended = jax.device_get(extend(*arrays, jax.device_put(positions, NamedSharding(mesh, P(BATCH, "context"))), SPEC))
    expected = slots.copy()
    expected[0, [5, 0, 3]] = new[0, [0, 1, 3]]
    np.testing.assert_array_equal(extended, expected)
