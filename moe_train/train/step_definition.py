"""What stays constant over all training steps: the model's structure, the objective, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.model.parameters import with_capacity, with_expert_ids, with_row_balance
from moe_train.train.objectives.choose import objective_of_run
from moe_train.train.objectives.objective import Objective


@dataclass(frozen=True)
class StepDefinition:
    """The constant part of a training step.

    Attributes:
        structure: structure of the model (see `model.parameters`).
        objective: what is minimized, in addition to the routers' losses.
        optimizer: turns gradients into updates.
        router_loss: coefficients that keep the routers balanced.
        microbatches: number of parts that the batch is split into; their gradients are summed.
        dropout_seed: seed of the adapters' dropout, used together with the step; None for no dropout.
        rounding: how updates reach bfloat16 weights.
        rounding_seed: seed of stochastic rounding, used together with the step; None for another rounding.
        spike_guard: which steps are spikes, whose update is skipped; None for no guard.
        gradient_dtype: dtype in which accumulated gradients are all-reduced over replicas; None for the parameters' own.
    """

    structure: PyTreeDef
    objective: Objective
    optimizer: optax.GradientTransformation
    router_loss: config.Loss = config.Loss()  # noqa: RUF009  # immutable
    microbatches: int = 1
    dropout_seed: int | None = None
    gradient_dtype: jnp.dtype | None = None
    spike_guard: config.SpikeGuard | None = None
    rounding: config.Rounding = "nearest"
    rounding_seed: int | None = None


def definition_of(
    run: config.Run, structure: PyTreeDef, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> StepDefinition:
    """Return the step definition of a run.

    Args:
        run: the resolved run.
        structure: structure of the model.
        optimizer: turns gradients into updates.
        objective: an objective to use instead of the run's own; None for the run's.
    """
    # Set here and not at initialization, since evaluation and generation with the same model drop nothing.
    structure = with_capacity(structure, run.train.capacity_factor)
    if run.loss.balance_over == "sequence":
        structure = with_row_balance(structure)
    objective = objective or objective_of_run(run)
    if objective.uses_reference:
        # The reference runs in every step, or the experts that it chose are stored, so that routing is compared at no further cost.
        structure = with_expert_ids(structure)
    return StepDefinition(
        structure=structure,
        objective=objective,
        optimizer=optimizer,
        router_loss=run.loss,
        microbatches=run.train.microbatches,
        dropout_seed=run.seed if run.lora and run.lora.dropout else None,
        gradient_dtype=jnp.dtype(run.compute.dtype),
        spike_guard=run.train.spike_guard,
        rounding=run.optimizer.rounding,
        rounding_seed=run.seed if run.optimizer.rounding == "stochastic" else None,
    )
