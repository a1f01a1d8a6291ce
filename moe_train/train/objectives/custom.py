"""An objective built from a user's own loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_train.data.batches.batch import Batch, PackedBatch
from moe_train.model.sharding.specs import plain_on_one_device
from moe_train.train.objectives.objective import Objective, ObjectiveInputs, Terms

LossFunction = Callable[..., tuple[Any, ...]]
"""`loss(model, batch, key)` -> (sum, weight, metrics) or (sum, weight, metrics, routers)."""


def custom_objective(function: LossFunction, batch_type: type[PackedBatch] = Batch) -> Objective:
    """Build an objective from a loss function; a step minimizes total(sum) / total(weight) over microbatches and devices.

        moe_train.train_run(run, moe_train.custom_objective(loss))

    Args:
        function: called with the model, one microbatch and the dropout key (or None), in global view. On a mesh of one device
            all arrays can be indexed freely; on other meshes use `train.token_logprobs` instead of indexing logits. Returns
            sum: scalar to be differentiated.
            weight: scalar, without gradient. If it depends on the batch only, no second forward pass runs for it.
            metrics: {name: `Mean`, or array to be summed}.
            routers: the router statistics that the model returned; needed if routers are trained to be balanced.
        batch_type: type of the batches that the function takes.
    """

    def first_pass(inputs: ObjectiveInputs) -> Any:
        # XLA removes what the weight does not need as dead code: usually the whole forward pass.
        _, weight, *_ = function(inputs.model, plain_on_one_device(inputs.batch), inputs.key)
        return weight

    def loss(inputs: ObjectiveInputs, first_pass_result: Any) -> Terms:
        total, _, metrics, *routers = function(inputs.model, plain_on_one_device(inputs.batch), inputs.key)
        return Terms(total, metrics, *routers)

    def step_weight(batch: Any, first_pass_result: Any) -> Any:
        # The first pass has summed the weights of all microbatches.
        return first_pass_result

    return Objective(batch_type, step_weight, loss, "objective", "weight", first_pass)
