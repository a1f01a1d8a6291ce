"""The step of a run, from its sections."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
import pytest

from moe_train import config
from moe_train.train.step_definition import StepDefinition, definition_of
from tests.run.tiny_config import LORA, MODEL, written
from tests.train.tiny_step import structure_of

OPTIMIZER = optax.identity()


def definition(**sections: Any) -> StepDefinition:
    run = config.run_of(written(**{"model": MODEL, "seed": 7, **sections}))
    return definition_of(run, structure_of(None), OPTIMIZER)


def test_the_sections_of_a_run_decide_its_step() -> None:
    step = definition(train={"steps": 3, "batch_size": 8, "seq_len": 32, "microbatches": 2}, compute={"dtype": "bfloat16"})
    assert step.microbatches == 2 and step.gradient_dtype == jnp.bfloat16 and step.optimizer is OPTIMIZER
    assert step.router_loss == config.Loss(load_balance_loss_coef=0.01, router_z_loss_coef=0.001)
    assert step.objective.mean_name == "cross_entropy"


@pytest.mark.parametrize(("dropout", "seed"), [(0.0, None), (0.1, 7)])
def test_dropout_has_the_seed_of_the_run(dropout: float, seed: int | None) -> None:
    assert definition(lora={**LORA, "dropout": dropout}, init_from="base").dropout_seed == seed
    assert definition().dropout_seed is None  # full training


def test_a_capacity_reaches_every_sparse_layer() -> None:
    bounded = definition(train={"steps": 3, "batch_size": 8, "seq_len": 32, "capacity_factor": 1.5, "max_drop_rate": 0.1})
    for step, factor in ((bounded, 1.5), (definition(), None)):
        model = step.structure.unflatten(range(step.structure.num_leaves))
        assert [layer.ffn.capacity_factor for stack in model.stacks for layer in stack.layers] == [factor]
