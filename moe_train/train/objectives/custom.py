"""An objective made of a person's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_train.data.batches.batch import Batch, PackedBatch
from moe_train.train.objectives.objective import Inputs, Objective, Terms

LossFunction = Callable[..., tuple[Any, ...]]
"""`loss(model, batch, key)` -> (sum, weight, metrics) or (sum, weight, metrics, routers)."""


def custom(function: LossFunction, batch_type: type[PackedBatch] = Batch) -> Objective:
    """Make an objective of a loss function; a step minimises total(sum) / total(weight) over microbatches and devices.

    Args:
        function: called with the model, one microbatch and the dropout key (or None), in global view. Returns
            sum: scalar, what is differentiated.
            weight: scalar, without gradient. Where it depends on the batch alone, no second forward pass runs for it.
            metrics: {name: `Mean`, or array to be summed}.
            routers: the router statistics that the model returned; needed where routers are trained to be balanced.
        batch_type: of the batches that the function takes.
    """

    def first_pass(inputs: Inputs) -> Any:
        # What is not needed for the weight is removed as dead code: usually the whole forward pass.
        _, weight, *_ = function(inputs.model, inputs.batch, inputs.key)
        return weight

    def loss(inputs: Inputs, of_step: Any) -> Terms:
        total, _, metrics, *routers = function(inputs.model, inputs.batch, inputs.key)
        return Terms(total, metrics, *routers)

    return Objective(batch_type, lambda batch, of_step: of_step, loss, "objective", "weight", first_pass)
