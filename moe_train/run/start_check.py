"""A check before the first step of a preference run: the model has to equal its reference, and the loss its known start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.evaluate.loss import batch_sums
from moe_train.machine.mesh import platform
from moe_train.run.start import Start
from moe_train.train.gradients import split_batch
from moe_train.train.objectives.objective import Mean, ModelWeights, Objective, objective_inputs
from moe_train.train.objectives.preference import reference_outputs
from moe_train.train.objectives.preference_losses import start_loss
from moe_train.train.token_logprobs import batch_logprobs

MEAN_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean difference, in nats for a token, by the dtype of the computation, of log-probabilities that were stored: other rows
may round differently, and a router's choice may change where two experts are equally good."""
CPU_LIMIT = {"float32": 1e-5, "bfloat16": 0.1}
"""The same where the reference is computed anew on a CPU: its kernels may take the two passes in another order of summation."""
LOSS_LIMIT = 1e-4
"""Largest difference of the loss from its known start, relative to it, where the reference is computed anew."""


class StartValues(NamedTuple):
    """What the check compares, on the first batch."""

    largest: Any
    """Largest difference between a token's log-probabilities under the model and under the reference, in nats."""
    mean: Any
    """Mean difference."""
    loss: Any
    """The loss without its likelihood term (`sft_weight`)."""
    expected_loss: Any
    """The loss of a model that equals its reference."""


def check_start(run: config.Run, objective: Objective, begin: Start, batch: Any, say: Callable[[str], None]) -> None:
    """Compare a new run with its reference on the first batch, and say the result.

    A resumed run, one that starts from a trained adapter, and a loss without a reference are not checked.

    Raises:
        ValueError: The model differs from its reference before the first step.
    """
    section = run.objective
    if not isinstance(section, config.Preference | config.UnpairedPreference) or not objective.uses_reference:
        return
    if begin.resumed or begin.adapter is not None:
        return
    weights = ModelWeights(begin.state.learned, begin.state.frozen, begin.base_weights)
    compute = jax.jit(partial(_start_values, section, objective, begin.structure, run.train.microbatches))
    values = StartValues(*(float(x) for x in compute(weights, batch)))
    is_stored = not begin.state.frozen
    # On accelerators XLA may fuse the two passes differently, so that only CPUs have to agree closely.
    is_close = platform() == "cpu" and not is_stored
    limit = (CPU_LIMIT if is_close else MEAN_LIMIT)[run.compute.dtype]
    difference = f"log-probabilities of answer tokens differ by {values.largest:.3g} nats at most and {values.mean:.3g} on average"
    if not values.mean <= limit:
        raise ValueError(
            f"{run.name}: before the first step the model should equal its reference, but {difference}; {_reason(is_stored)}"
        )
    # Rewards are sums over the tokens of an answer, so where they round differently the loss may differ by more.
    if is_close and not abs(values.loss - values.expected_loss) <= LOSS_LIMIT * values.expected_loss:
        raise ValueError(
            f"{run.name}: before the first step the loss is {values.loss:.6g} and should be {values.expected_loss:.6g}; the first "
            "batch does not hold whole pairs, which is a bug in its batch type"
        )
    say(f"start check: rewards are 0 and the loss is {values.loss:.4f}, as expected ({difference})")


def _reason(is_stored: bool) -> str:
    """Return what may be wrong, and what to do."""
    if is_stored:
        return (
            "the stored reference log-probabilities are of another model, or of tokens that were made otherwise (a second BOS or "
            "EOS, tokens merged where prompt and answer meet); remove the reference-* folder of the prepared set"
        )
    return "the new adapters should add nothing yet; state lora.init_from if they are to continue a trained adapter"


def _start_values(
    section: config.Preference | config.UnpairedPreference,
    objective: Objective,
    structure: PyTreeDef,
    microbatches: int,
    weights: ModelWeights,
    batch: Any,
) -> StartValues:
    """Compute the values of a batch's first microbatch in one program, without dropout."""
    # One microbatch is the most that training computes at once.
    batch = jax.tree.map(lambda x: x[0], split_batch(batch, None, microbatches)[0])
    inputs = objective_inputs(objective, structure, weights, batch)
    outputs, _ = batch_logprobs(inputs.model, batch)
    counted = batch.loss_mask & (batch.segment_ids != 0)
    differences = jnp.where(counted, jnp.abs(outputs.logprob - reference_outputs(inputs).logprob), 0)
    metrics, _ = batch_sums(objective, inputs)
    loss = _value(metrics["loss"])
    expected = jnp.float32(start_loss(section) or 0.0)
    if isinstance(section, config.Preference):
        loss -= section.sft_weight * _value(metrics["nll_loss"])
    else:
        good = metrics["rewards/chosen"].weight
        bad = metrics["rewards/rejected"].weight
        expected *= (section.desirable_weight * good + section.undesirable_weight * bad) / jnp.maximum(good + bad, 1)
    return StartValues(jnp.max(differences), jnp.sum(differences) / jnp.maximum(jnp.sum(counted), 1), loss, expected)


def _value(metric: Mean) -> Any:
    """Return the value of a mean, 0 without weight."""
    return metric.sum / jnp.maximum(metric.weight, 1)
