"""Assignments that differ from a base model's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_train.model.moe.drift import changed_assignments, experts_by_layer, experts_by_position


def test_the_order_of_a_tokens_experts_does_not_matter_and_padding_is_not_counted() -> None:
    ids = jnp.array([[[[0, 1], [2, 3], [0, 3]]], [[[1, 2], [1, 2], [1, 2]]]])
    base = jnp.array([[[[1, 0], [2, 0], [1, 2]]], [[[3, 0], [1, 2], [3, 0]]]])
    counts = changed_assignments(ids, base, jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(counts.changed_L, [1, 2])
    assert counts.assignments == 4


def test_experts_that_are_stored_by_position_come_back_by_layer() -> None:
    ids = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    stored = experts_by_position(ids)
    np.testing.assert_array_equal(stored[1, 2], [*ids[0, 1, 2], *ids[1, 1, 2]])
    np.testing.assert_array_equal(experts_by_layer(stored, 5), ids)
