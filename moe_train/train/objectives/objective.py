"""The definition of an objective: the one record through which training, held-out evaluation and the commands use it.

A step minimizes total(sum) / total(weight), where the totals are over all its microbatches and devices. Objectives are
written in global view, for one microbatch: they sum over the arrays that they are given, and the caller adds the sums of
microbatches and replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float, Key, Num

from moe_train.data.batches.batch import PackedBatch
from moe_train.model.moe.router import RouterStats
from moe_train.model.parameters import Parameters, combine, without_adapters
from moe_train.model.transformer import Transformer

DRIFT_METRIC = "routing_drift"
"""Name of the metric with the share of changed routing choices in each sparse layer."""


class ObjectiveInputs(NamedTuple):
    """Inputs of an objective for one microbatch."""

    model: Transformer
    batch: Any
    """A batch of the objective's batch type."""
    key: Key[Array, ""] | None = None
    """PRNG key for dropout; None for no dropout, as in evaluation."""
    reference: Transformer | None = None
    """The model before training, if the objective uses it and it costs no second copy: the same model without its adapters.

    None in full training.
    """


class Mean(NamedTuple):
    """A metric that is total(sum) / total(weight) over a step, or over held-out data."""

    sum: Any
    weight: Any


Metric = Any
"""A `Mean`, or an array that is summed."""


class Terms(NamedTuple):
    """Result of an objective for one microbatch, or summed over several."""

    sum: Float[Array, ""]
    """The sum that is differentiated."""
    metrics: Mapping[str, Metric]
    routers: RouterStats | None = None
    """Router statistics as the model returned them; None for a dense model.

    The step adds the routers' own losses, updates their biases and counts dropped tokens.
    """


@dataclass(frozen=True)
class Objective:
    """What a model is trained for.

    Attributes:
        batch_type: type of the batches that the loader makes for it.
        weight: divisor of the step's sum, for instance the number of tokens, given the batch of the whole step and the result of
            the first pass; no gradient flows through it.
        loss: the objective's terms for a microbatch, given the result of the first pass.
        mean_name: name of total(sum) / total(weight) among the metrics of a step; for held-out data it is called `loss`.
        weight_name: name of total(weight) among the metrics.
        first_pass: a gradient-free pass over all microbatches before the first gradient, or None. It returns a pytree of
            sums over its microbatch, which are added over the step; `weight` and the loss of every microbatch receive it.
        uses_reference: whether the objective uses `ObjectiveInputs.reference`.
    """

    batch_type: type[PackedBatch]
    weight: Callable[[Any, Any], Num[Array, ""]]
    loss: Callable[[ObjectiveInputs, Any], Terms]
    mean_name: str
    weight_name: str
    first_pass: Callable[[ObjectiveInputs], Any] | None = None
    uses_reference: bool = False


class ModelWeights(NamedTuple):
    """A model's arrays, as `combine` takes them, and the arrays of the reference model that differ from them."""

    learned: Parameters
    frozen: Parameters
    base: Parameters
    """Base weights of what is trained in full together with adapters; read only if an objective uses a reference."""


def objective_inputs(
    objective: Objective, structure: PyTreeDef, weights: ModelWeights, batch: Any, key: Key[Array, ""] | None = None
) -> ObjectiveInputs:
    """Build the model and, if the objective uses it and there are frozen weights, the reference model.

    Args:
        objective: the objective.
        structure: structure of the model.
        weights: the model's arrays. Without frozen weights (full training) there is no reference model.
        batch: one microbatch.
        key: PRNG key for dropout; None for no dropout.
    """
    model = combine(structure, weights.learned, weights.frozen)
    reference = None
    if objective.uses_reference and weights.frozen:
        reference = combine(without_adapters(structure), weights.base, weights.frozen)
    return ObjectiveInputs(model, batch, key, reference)


def step_metrics(objective: Objective, terms: Terms, weight: Num[Array, ""]) -> dict[str, Metric]:
    """Return all metrics of a step.

    Raises:
        ValueError: a metric of the objective has a name that the step uses itself.
    """
    own: dict[str, Metric] = {objective.mean_name: Mean(terms.sum, weight), objective.weight_name: weight}
    taken = {"loss", *own} & set(terms.metrics)
    if taken:
        raise ValueError(f"the objective's metrics {sorted(taken)} have names that the step gives itself; rename them")
    return own | dict(terms.metrics)


def held_out_metrics(objective: Objective, terms: Terms, weight: Num[Array, ""]) -> dict[str, Metric]:
    """Return all metrics of held-out data. The objective's mean is the loss there, since routers add none."""
    metrics = step_metrics(objective, terms, weight)
    return {"loss": metrics.pop(objective.mean_name), **metrics}


def divide(total: Num[Array, "*dims"], weight: Num[Array, ""]) -> Float[Array, "*dims"]:
    """Return total / weight, or total if the weight is 0, as in a step without tokens to train on."""
    return total / jnp.where(weight == 0, 1, weight)
