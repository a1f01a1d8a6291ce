"""An objective's metrics over batches that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moe_train.model.moe.router import RouterStats
from moe_train.model.parameters import Parameters
from moe_train.train.objectives.objective import Inputs, Metric, Objective, Weights, held_out_metrics, inputs_of

BatchSums = Callable[[Parameters, Parameters, Any], dict[str, Metric]]
"""(learned weights, frozen weights, batch) -> metrics of the batch, `loss` among them, as sums over it."""


def make_batch_sums(structure: Any, objective: Objective, base_weights: Parameters | None = None) -> BatchSums:
    """Metrics of a batch, compiled once for all evaluations of a run.

    base_weights: the base's weights of what is trained in full beside adapters, for an objective with a reference model.
    """

    @jax.jit
    def sums(weights: Weights, batch: Any) -> dict[str, Metric]:
        return batch_sums(objective, inputs_of(objective, structure, weights, batch))[0]

    return lambda learned, frozen, batch: sums(Weights(learned, frozen, base_weights or {}), batch)


def batch_sums(objective: Objective, inputs: Inputs) -> tuple[dict[str, Metric], RouterStats | None]:
    """(metrics of a batch as sums, the routers' statistics); the batch is a step of its own to the objective."""
    of_step = None if objective.first_pass is None else objective.first_pass(inputs)
    terms = objective.loss(inputs, of_step)
    return held_out_metrics(objective, terms, objective.weight(inputs.batch, of_step)), terms.routers
