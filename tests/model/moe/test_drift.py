"""Assignments that differ from a base model's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_train.model.moe.drift import changed_assignments


def test_the_order_of_a_tokens_experts_does_not_matter_and_padding_is_not_counted() -> None:
    ids = jnp.array([[[[0, 1], [2, 3], [0, 3]]], [[[1, 2], [1, 2], [1, 2]]]])
    base = jnp.array([[[[1, 0], [2, 0], [1, 2]]], [[[3, 0], [1, 2], [3, 0]]]])
    counts = changed_assignments(ids, base, jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(counts.changed_L, [1, 2])
    assert counts.assignments == 4
