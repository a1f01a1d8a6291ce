"""Cross-entropy over the loss-bearing tokens."""

from __future__ import annotations

from functools import partial

import jax
import optax
import pytest

from moe_train.machine.mesh import put_batch
from moe_train.train.objectives.custom import custom_objective
from moe_train.train.objectives.next_token import next_token
from moe_train.train.state import create_state
from moe_train.train.step import train_step
from moe_train.train.step_definition import StepDefinition
from tests.random_parameters import random_parameters
from tests.train.tiny_objectives import COEFS, by_hand
from tests.train.tiny_step import MESHES, MODEL, batch, structure_of


@pytest.mark.parametrize("mesh", ["one device", "data, fsdp, tensor"])
def test_a_cross_entropy_by_hand_takes_the_step_of_next_token(mesh: str) -> None:
    """The same weights after a step, the routers' losses included; sums and means go among the metrics."""
    found = []
    with jax.set_mesh(MESHES[mesh]):
        for objective in (custom_objective(by_hand), next_token()):
            optimizer = optax.sgd(1.0)
            state = create_state(random_parameters(MODEL, scale=0.3), optimizer)
            definition = StepDefinition(structure_of(None), objective, optimizer, COEFS, microbatches=2)
            found.append(jax.device_get(jax.jit(partial(train_step, definition))(state, put_batch(batch(), MESHES[mesh]))))
    (state, metrics), (wanted, wanted_metrics) = found
    assert metrics.loss == pytest.approx(wanted_metrics.loss, rel=1e-5)
    assert metrics.objective["objective"] == pytest.approx(wanted_metrics.objective["cross_entropy"], rel=1e-5)
    assert metrics.objective["weight"] == wanted_metrics.objective["loss_tokens"] == batch().loss_mask.sum()
    assert metrics.objective["rows"] == len(batch().tokens)
    for path, weight in wanted.trainable.items():
        assert state.trainable[path] == pytest.approx(weight, abs=1e-5), path


def test_the_weight_is_the_number_of_loss_bearing_tokens() -> None:
    rows = batch()
    assert next_token().weight(rows, None) == rows.loss_mask.sum() > 0
    assert next_token().weight(rows._replace(loss_mask=rows.loss_mask & False), None) == 0
