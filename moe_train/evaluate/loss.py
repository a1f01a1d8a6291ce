"""The metrics of an objective on batches that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import PyTreeDef

from moe_train.model.moe.router import RouterStats
from moe_train.model.parameters import Parameters
from moe_train.train.objectives.objective import (
    Metric,
    ModelWeights,
    Objective,
    ObjectiveInputs,
    held_out_metrics,
    objective_inputs,
)

BatchSums = Callable[[Parameters, Parameters, Any], dict[str, Metric]]
"""A function (trained weights, frozen weights, batch) -> metrics of the batch, including `loss`, as sums over the batch."""


def make_batch_sums(structure: PyTreeDef, objective: Objective, base_weights: Parameters | None = None) -> BatchSums:
    """Compile the function that computes a batch's metrics, once for all evaluations of a run.

    Args:
        structure: The model without its weights.
        objective: The objective.
        base_weights: The base model's weights of the modules that are trained in full in addition to adapters, for an
            objective with a reference model; None if there are none.
    """

    @jax.jit
    def sums(weights: ModelWeights, batch: Any) -> dict[str, Metric]:
        return batch_sums(objective, objective_inputs(objective, structure, weights, batch))[0]

    return lambda params, frozen, batch: sums(ModelWeights(params, frozen, base_weights or {}), batch)


def batch_sums(objective: Objective, inputs: ObjectiveInputs) -> tuple[dict[str, Metric], RouterStats | None]:
    """Compute the metrics of a batch, which the objective treats as a step of its own.

    Returns:
        The metrics as sums over the batch, and the routers' statistics (None without routers).
    """
    # In training, the first pass covers all microbatches of a step; here the batch is the whole step.
    first_pass_result = None if objective.first_pass is None else objective.first_pass(inputs)
    terms = objective.loss(inputs, first_pass_result)
    return held_out_metrics(objective, terms, objective.weight(inputs.batch, first_pass_result)), terms.routers
