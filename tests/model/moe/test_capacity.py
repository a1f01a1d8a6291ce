"""Capacities by hand; that tokens beyond them are dropped on every mesh is tested with the experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moe_train.model.moe.capacity import capacity, within_capacity
from tests.tiny import ONE


@pytest.mark.parametrize(("factor", "seq_len", "limit"), [(1.0, 8, 4), (1.25, 8, 5), (1.1, 10, 6), (0.1, 1, 1)])
def test_a_capacity_is_rounded_up(factor: float, seq_len: int, limit: int) -> None:
    assert capacity(factor, seq_len, experts_per_token=2, num_experts=4) == limit


def test_a_capacity_is_exact_in_decimals() -> None:
    assert 1.1 * 50 / 5 > 11  # in binary
    assert capacity(1.1, 50, experts_per_token=1, num_experts=5) == 11


def test_earlier_tokens_and_first_choices_take_precedence() -> None:
    """Two experts take ceil(0.5 * 4 * 2 / 2) = 2 assignments of a row; 2 stands for one that is dropped, or was padding."""
    ids = jnp.array([[[0, 1], [0, 1], [0, 1], [1, 0]], [[2, 2], [1, 0], [1, 2], [1, 0]]])
    with jax.set_mesh(ONE):
        kept = within_capacity(ids, num_experts=2, capacity_factor=0.5)
    assert kept.tolist() == [[[0, 1], [0, 1], [2, 2], [2, 2]], [[2, 2], [1, 0], [1, 2], [2, 0]]]
