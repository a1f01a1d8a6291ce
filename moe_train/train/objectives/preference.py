"""Learning from preference pairs: DPO and its relatives (see `preference_losses`)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_train import config
from moe_train.data.batches.answer_batches import PreferenceBatch, SharedPromptBatch
from moe_train.model.moe.drift import changed_assignments, experts_by_layer
from moe_train.model.moe.router import RouterStats
from moe_train.train.objectives.answer_sums import count_pairs, pairs_of, sum_by_answer
from moe_train.train.objectives.objective import DRIFT_METRIC, Mean, Metric, Objective, ObjectiveInputs, Terms, divide
from moe_train.train.objectives.preference_losses import PairLogprobs, log_odds_ratio, pair_losses
from moe_train.train.token_logprobs import batch_logprobs


class StepCounts(NamedTuple):
    """Counts over a step, which divide sums of its microbatches."""

    pairs: Int[Array, ""]
    likelihood_tokens: Int[Array, ""]
    """Number of tokens whose mean negative log-likelihood is a term of the loss."""


def preference(section: config.Preference) -> Objective:
    """Return the objective of a config section; its batch type is `SharedPromptBatch` if it states so, or `PreferenceBatch`."""
    return Objective(
        SharedPromptBatch if section.shared_prompt is True else PreferenceBatch,
        _weight,
        partial(_loss, section),
        mean_name="preference_loss",
        weight_name="pairs",
        first_pass=partial(_count, section),
        uses_reference=section.has_reference,
    )


def _weight(batch: Any, counts: StepCounts) -> Int[Array, ""]:
    """Return the number of pairs of the step."""
    return counts.pairs


def _count(section: config.Preference, inputs: ObjectiveInputs) -> StepCounts:
    """Count pairs and tokens of a microbatch; it needs no forward pass."""
    return StepCounts(count_pairs(inputs.batch.answer_ids), jnp.sum(_likelihood_mask(section, inputs.batch)))


def _likelihood_mask(section: config.Preference, batch: Any) -> Bool[Array, "B T"]:
    """Return the targets whose mean negative log-likelihood is a term of the loss: chosen answers, in ORPO with their prompts."""
    is_chosen = batch.answer_ids % 2 == 1
    return is_chosen if section.loss == "orpo" else is_chosen & batch.loss_mask


def _loss(section: config.Preference, inputs: ObjectiveInputs, counts: StepCounts) -> Terms:
    """Sum the losses of a microbatch's pairs."""
    batch = inputs.batch
    outputs, routers = batch_logprobs(inputs.model, batch, inputs.key)
    reference = ReferenceOutputs(jnp.zeros_like(outputs.logprob))
    if section.has_reference:
        reference = reference_outputs(inputs)
    pairs = _pair_logprobs(batch, outputs.logprob, reference.logprob)
    has_pair = pairs.chosen_tokens > 0
    # Places without a pair get values at which every loss has a finite gradient; they are left out of the sum.
    pairs = PairLogprobs(*(jnp.where(has_pair, x, fill) for x, fill in zip(pairs, (-1.0, -1.0, -1.0, -1.0, 1.0, 1.0), strict=True)))
    total = jnp.sum(jnp.where(has_pair, pair_losses(section, pairs), 0))
    likelihood_weight = 1.0 if section.loss == "orpo" else section.sft_weight
    likelihood_mask = _likelihood_mask(section, batch)
    negative_log_likelihood = -jnp.sum(jnp.where(likelihood_mask, outputs.logprob, 0))
    if likelihood_weight:
        # The step divides by its pairs; this term is a mean over the tokens of the step.
        total += likelihood_weight * negative_log_likelihood * divide(counts.pairs, counts.likelihood_tokens)
    metrics = _metrics(section, pairs, has_pair) | drift_metric(batch, routers, reference)
    metrics["nll_loss"] = Mean(negative_log_likelihood, jnp.sum(likelihood_mask))
    metrics["entropy"] = Mean(jnp.sum(jnp.where(batch.loss_mask, outputs.entropy, 0)), jnp.sum(batch.loss_mask))
    return Terms(total, metrics, routers)


class ReferenceOutputs(NamedTuple):
    """What the reference makes of a batch."""

    logprob: Float[Array, "B T"]
    """Log-probability of each target."""
    expert_ids: Int[Array, "L B T A"] | None = None
    """Experts that the reference chooses; None where the batch holds what is stored of it, and for a dense model."""


def reference_outputs(inputs: ObjectiveInputs) -> ReferenceOutputs:
    """Return the outputs of the reference, without gradients: the model without adapters, or what the batch holds."""
    if inputs.reference is None:
        return ReferenceOutputs(inputs.batch.reference)
    outputs, routers = batch_logprobs(inputs.reference, inputs.batch)
    return jax.lax.stop_gradient(ReferenceOutputs(outputs.logprob, None if routers is None else routers.expert_ids))


def drift_metric(batch: Any, routers: RouterStats | None, reference: ReferenceOutputs) -> dict[str, Metric]:
    """Return the share of routing choices of each sparse layer that differ from the reference's.

    Returns:
        Nothing unless the model keeps the experts that it chooses (`with_expert_ids`), and those of the reference are known.
    """
    if routers is None or routers.expert_ids is None:
        return {}
    base_ids_LBTA = reference.expert_ids
    if base_ids_LBTA is None and batch.reference_experts.shape[-1]:
        base_ids_LBTA = experts_by_layer(batch.reference_experts.astype(jnp.int32), routers.expert_ids.shape[-1])
    if base_ids_LBTA is None:
        return {}
    return {DRIFT_METRIC: Mean(*changed_assignments(routers.expert_ids, base_ids_LBTA, batch.segment_ids != 0))}


def _pair_logprobs(batch: Any, logprob_BT: Float[Array, "B T"], reference_BT: Float[Array, "B T"]) -> PairLogprobs:
    """Sum log-probabilities over the answers of each pair; zeros where a row has fewer pairs."""

    def sums(values_BT: Float[Array, "B T"]) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
        return pairs_of(sum_by_answer(jnp.where(batch.loss_mask, values_BT, 0), batch.answer_ids))

    return PairLogprobs(*sums(logprob_BT), *sums(reference_BT), *sums(jnp.ones_like(logprob_BT)))


def _metrics(section: config.Preference, pairs: PairLogprobs, has_pair: Bool[Array, "B P"]) -> dict[str, Metric]:
    """Return rewards and log-probabilities under TRL's names; without a reference they are means over the tokens of an answer."""
    count = jnp.sum(has_pair)
    logps = (pairs.chosen, pairs.rejected)
    if not section.has_reference:
        logps = (pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens)
    chosen, rejected = (section.beta * x for x in logps)
    if section.has_reference:
        chosen = section.beta * (pairs.chosen - pairs.reference_chosen)
        rejected = section.beta * (pairs.rejected - pairs.reference_rejected)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    if section.loss == "orpo":
        values["log_odds_chosen"] = log_odds_ratio(*logps)
        values["log_odds_ratio"] = jax.nn.log_sigmoid(values["log_odds_chosen"])
    metrics: dict[str, Metric] = {}
    for name, value in values.items():
        metrics[name] = Mean(jax.lax.stop_gradient(jnp.sum(jnp.where(has_pair, value, 0))), count)
    return metrics
