"""What stays the same from step to step: the model's structure, the objective, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from moe_train import config
from moe_train.model.parameters import with_capacity
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import Objective


@dataclass(frozen=True)
class StepDefinition:
    """What a training step does.

    Attributes:
        structure: the model's (see `model.parameters`).
        objective: what is minimised, beside the routers' losses.
        optimizer: turns gradients into updates.
        router_loss: how routers are kept balanced.
        microbatches: parts that the batch is split into; their gradients are summed.
        dropout_seed: of the adapters' dropout, together with the step; None where they have none.
        gradient_dtype: in which accumulated gradients go from replica to replica; None: in the parameters' own.
    """

    structure: Any
    objective: Objective
    optimizer: optax.GradientTransformation
    router_loss: config.Loss = config.Loss()  # noqa: RUF009  # immutable
    microbatches: int = 1
    dropout_seed: int | None = None
    gradient_dtype: jnp.dtype | None = None


def definition_of(
    run: config.Run, structure: Any, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> StepDefinition:
    """The step of a run. objective: None for the one that the run names."""
    return StepDefinition(
        structure=with_capacity(structure, run.train.capacity_factor),
        objective=objective or objective_of(run.objective),
        optimizer=optimizer,
        router_loss=run.loss,
        microbatches=run.train.microbatches,
        dropout_seed=run.seed if run.lora and run.lora.dropout else None,
        gradient_dtype=jnp.dtype(run.compute.dtype),
    )
