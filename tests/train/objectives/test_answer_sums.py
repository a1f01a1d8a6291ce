"""Sums over the answers of rows, on one device and with positions split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.machine.mesh import put_batch
from moe_train.train.objectives.answer_sums import count_pairs, pairs_of, sum_by_answer
from tests.train.tiny_step import MESHES


@pytest.mark.parametrize("mesh", ["one device", "fsdp, expert, context"])
def test_sums_and_their_gradients_stay_with_their_answers(mesh: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 6)).astype(np.float32)
    ids = np.sort(rng.integers(0, 5, (8, 6)), axis=1).astype(np.int32)

    def weighted(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = sum_by_answer(values, ids)
        return jnp.sum(sums * jnp.arange(1, 7)), sums

    with jax.set_mesh(MESHES[mesh]):
        arrays = put_batch((values, ids), MESHES[mesh])
        (_, sums), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(*arrays)
        first, second = pairs_of(sums)
        assert count_pairs(arrays[1]) == ids.max(axis=1).sum() // 2
    expected = np.stack([(values * (ids == k)).sum(axis=1) for k in range(1, 7)], axis=1)
    np.testing.assert_allclose(sums, expected, atol=1e-6)
    np.testing.assert_allclose(first, expected[:, ::2], atol=1e-6)
    np.testing.assert_allclose(second, expected[:, 1::2], atol=1e-6)
    np.testing.assert_array_equal(gradient, ids)


def test_an_odd_number_of_positions_has_a_column_more() -> None:
    with jax.set_mesh(MESHES["one device"]):
        assert sum_by_answer(jnp.ones((1, 5)), jnp.array([[1, 1, 2, 0, 3]])).tolist() == [[2, 1, 1, 0, 0, 0]]
