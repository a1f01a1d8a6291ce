"""Names and means of an objective's metrics."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Mean, Terms, divide, held_out_metrics, step_metrics


def test_the_objective_names_its_mean_and_its_weight() -> None:
    terms = Terms(jnp.float32(6), {"rows": jnp.int32(2)})
    mean = Mean(terms.sum, jnp.int32(3))
    assert step_metrics(next_token(), terms, mean.weight) == {"cross_entropy": mean, "loss_tokens": 3, "rows": 2}
    assert held_out_metrics(next_token(), terms, mean.weight) == {"loss": mean, "loss_tokens": 3, "rows": 2}


@pytest.mark.parametrize("name", ["loss", "cross_entropy", "loss_tokens"])
def test_a_metric_cannot_take_a_name_of_the_step(name: str) -> None:
    terms = Terms(jnp.float32(6), {name: jnp.int32(2)})
    with pytest.raises(ValueError, match=rf"metrics \['{name}'\] have names that the step gives itself; rename them"):
        step_metrics(next_token(), terms, jnp.int32(3))


def test_a_weight_of_zero_divides_nothing() -> None:
    assert divide(jnp.float32(0), jnp.int32(0)) == 0
    assert divide(jnp.float32(3), jnp.float32(0.5)) == 6
