"""Separate experts against a plain loop; how they run within a model is tested with `separate_layers`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights, SeparateExperts
from moe_train.model.moe.separate_experts import apply_separate_experts, row_counts

E, D, F = 3, 5, 4


def test_row_counts() -> None:
    assert [row_counts(rows, 8) for rows in (2, 16, 64)] == [(1, 2), (1, 2, 4, 16), (4, 8, 16, 64)]
    assert row_counts(1, 1) == (1,)


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 0, 0), (0, 7, 0), (70, 1, 129)], ids=["some", "none", "one expert", "many"])
def test_each_expert_has_its_rows(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    rows = max(sum(sizes), 7)
    x = random.normal(size=(rows, D)).astype(np.float32)
    weights = [[random.normal(size=shape).astype(np.float32) for shape in ((D, F), (D, F), (F, D))] for _ in range(E)]
    experts = tuple(ExpertWeights(*(ExpertMatrix(jnp.asarray(w), None, None) for w in of_expert)) for of_expert in weights)
    y = jax.jit(apply_separate_experts)(x, np.array(sizes, np.int32), SeparateExperts(experts))
    expected = np.zeros((rows, D), np.float32)
    start = 0
    for size, (gate, up, down) in zip(sizes, weights, strict=True):
        own = x[start : start + size]
        expected[start : start + size] = (np.asarray(jax.nn.silu(own @ gate)) * (own @ up)) @ down
        start += size
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
