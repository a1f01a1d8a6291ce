"""What an objective is: the one record through which the step, held-out evaluation and the commands see it.

A step minimises total(sum) / total(weight), the totals being over all its microbatches and devices. Objectives are
written in global view, for one microbatch: they sum over the arrays that they see, and whoever calls them adds the sums
of microbatches and replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from moe_train.data.batches.batch import PackedBatch
from moe_train.model.moe.router import RouterStats
from moe_train.model.parameters import Parameters, combine, without_adapters
from moe_train.model.transformer import Transformer


class Inputs(NamedTuple):
    """What an objective sees of a microbatch."""

    model: Transformer
    batch: Any
    """Of the objective's batch type."""
    key: Array | None = None
    """For dropout; None where there is none, as in evaluation."""
    reference: Transformer | None = None
    """The model before training, where the objective uses one and it costs no second copy: the same model without its
    adapters. None in full training."""


class Mean(NamedTuple):
    """A metric that is total(sum) / total(weight) over a step, or over held-out data."""

    sum: Any
    weight: Any


Metric = Any
"""A `Mean`, or an array that is summed."""


class Terms(NamedTuple):
    """An objective's answer for a microbatch, or summed over several."""

    sum: Array
    """What is differentiated."""
    metrics: Mapping[str, Metric]
    routers: RouterStats | None = None
    """As the model returned them; the step adds the routers' own losses, moves their biases and counts dropped tokens."""


@dataclass(frozen=True)
class Objective:
    """What a model is trained for.

    Attributes:
        batch_type: what the loader makes for it.
        weight: what the step's sum is divided by, for instance the number of tokens, given the batch of the whole step and
            the result of the first pass; a constant to the gradient.
        loss: its sum over a microbatch, given the result of the first pass.
        mean_name: the name of total(sum) / total(weight) among the metrics of a step; held-out data calls it `loss`.
        weight_name: the name of total(weight).
        first_pass: a gradient-free pass over all microbatches before the first gradient, or None. It returns a pytree of
            sums over its microbatch, which are added over the step; `weight` and the loss of every microbatch receive it.
        uses_reference: whether it wants `Inputs.reference`.
    """

    batch_type: type[PackedBatch]
    weight: Callable[[Any, Any], Array]
    loss: Callable[[Inputs, Any], Terms]
    mean_name: str
    weight_name: str
    first_pass: Callable[[Inputs], Any] | None = None
    uses_reference: bool = False


class Weights(NamedTuple):
    """A model's arrays, as `combine` takes them, and those of the reference model that differ."""

    learned: Parameters
    frozen: Parameters
    base: Parameters
    """Base weights of what is trained in full beside adapters; read only where an objective uses a reference."""


def inputs_of(objective: Objective, structure: Any, weights: Weights, batch: Any, key: Array | None = None) -> Inputs:
    """Build the model, and the reference model where the objective uses one and nothing but adapters separates them."""
    model = combine(structure, weights.learned, weights.frozen)
    reference = None
    if objective.uses_reference and weights.frozen:
        reference = combine(without_adapters(structure), weights.base, weights.frozen)
    return Inputs(model, batch, key, reference)


def step_metrics(objective: Objective, terms: Terms, weight: Array) -> dict[str, Metric]:
    """All metrics of a step. Raises ValueError where the objective gives two the same name."""
    own = {objective.mean_name: Mean(terms.sum, weight), objective.weight_name: weight}
    if taken := {"loss", *own} & set(terms.metrics):
        raise ValueError(f"the objective's metrics {sorted(taken)} have names that the step gives itself; rename them")
    return own | dict(terms.metrics)


def held_out_metrics(objective: Objective, terms: Terms, weight: Array) -> dict[str, Metric]:
    """All metrics of held-out data: the objective's mean is the loss there, since routers add none."""
    metrics = step_metrics(objective, terms, weight)
    return {"loss": metrics.pop(objective.mean_name), **metrics}


def divide(total: Array, weight: Array) -> Array:
    """total / weight; total where the weight is 0, as in a step without loss-bearing tokens."""
    return total / jnp.where(weight == 0, 1, weight)
