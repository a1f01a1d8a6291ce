"""Optimizers, schedules and losses, by values just beyond their limits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.tiny import refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rate": 0}, "greater than 0"),
        ({"optimizer.b1": 1.0}, "less than 1"),
        ({"optimizer.schedule": {"name": "cosine", "final_fraction": 1.1}}, "less than or equal to 1"),
        ({"optimizer.no_decay": ["norm"]}, "'norms', 'biases', 'router' or 'embeddings'"),
        ({"loss.router_z_loss_coef": -0.1}, "greater than or equal to 0"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)
