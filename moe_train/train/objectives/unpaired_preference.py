"""Learning from answers that are labelled as good or bad: KTO (arXiv:2402.01306, eq. 7).

With r the log-ratio of an answer and z the mean log-ratio of mismatched answers over the whole step, at least 0 and without a
gradient, a good answer costs w_good (1 - sigmoid(beta (r - z))) and a bad one w_bad (1 - sigmoid(beta (z - r))).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_train import config
from moe_train.data.batches.answer_batches import UnpairedBatch
from moe_train.train.objectives.answer_sums import count_pairs, pairs_of, sum_by_answer
from moe_train.train.objectives.objective import Mean, Metric, Objective, ObjectiveInputs, Terms, divide
from moe_train.train.objectives.preference import drift_metric, reference_outputs
from moe_train.train.token_logprobs import batch_logprobs


class StepSums(NamedTuple):
    """Sums over a step."""

    mismatched: Float[Array, ""]
    """Sum of the log-ratios of mismatched answers."""
    answers: Int[Array, ""]
    good: Int[Array, ""]


class _Answers(NamedTuple):
    """Log-ratios and properties of the labelled answers, (B, P) each."""

    logps: Float[Array, "B P"]
    log_ratios: Float[Array, "B P"]
    exists: Float[Array, "B P"]
    """1 where a row has an answer, otherwise 0."""
    good: Float[Array, "B P"]
    """1 for a good answer, otherwise 0."""


def unpaired_preference(section: config.UnpairedPreference) -> Objective:
    """Return the objective of a config section; its batch type is `UnpairedBatch`."""
    return Objective(
        UnpairedBatch,
        _weight,
        partial(_loss, section),
        mean_name="preference_loss",
        weight_name="answers",
        first_pass=_mismatched_sums,
        uses_reference=True,
    )


def _weight(batch: Any, sums: StepSums) -> Int[Array, ""]:
    """Return the number of labelled answers of the step."""
    return sums.answers


def _mismatched_sums(inputs: ObjectiveInputs) -> StepSums:
    """Sum the log-ratios of mismatched answers in a forward pass that leaves the labelled ones out."""
    batch = inputs.batch
    mismatched = inputs._replace(batch=batch._replace(segment_ids=batch.mismatched_ids))
    outputs, _ = batch_logprobs(mismatched.model, mismatched.batch, mismatched.key)
    log_ratios_BT = outputs.logprob - reference_outputs(mismatched).logprob
    total = jnp.sum(jnp.where(batch.loss_mask & (batch.mismatched_ids != 0), log_ratios_BT, 0))
    _, good = pairs_of_labels(batch)
    return StepSums(total, count_pairs(batch.answer_ids), jnp.sum(good).astype(jnp.int32))


def pairs_of_labels(batch: Any) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Return (1 where a row has a labelled answer, 1 where that answer is good)."""
    # One position stands for an answer: the first one of its first segment.
    tokens, _ = pairs_of(sum_by_answer(batch.loss_mask.astype(jnp.float32), batch.answer_ids))
    good, _ = pairs_of(sum_by_answer((batch.loss_mask & batch.good).astype(jnp.float32), batch.answer_ids))
    return (tokens > 0).astype(jnp.float32), (good > 0).astype(jnp.float32)


def _labelled(batch: Any, logprob_BT: Float[Array, "B T"], reference_BT: Float[Array, "B T"]) -> _Answers:
    """Return the log-ratios of the labelled answers."""

    def sums(values_BT: Float[Array, "B T"]) -> Float[Array, "B P"]:
        return pairs_of(sum_by_answer(jnp.where(batch.loss_mask, values_BT, 0), batch.answer_ids))[0]

    logps = sums(logprob_BT)
    return _Answers(logps, logps - sums(reference_BT), *pairs_of_labels(batch))


def _loss(section: config.UnpairedPreference, inputs: ObjectiveInputs, step: StepSums) -> Terms:
    """Sum the losses of a microbatch's answers."""
    batch = inputs.batch
    outputs, routers = batch_logprobs(inputs.model, batch, inputs.key)
    reference = reference_outputs(inputs)
    answers = _labelled(batch, outputs.logprob, reference.logprob)
    kl = jnp.maximum(divide(step.mismatched, step.answers), 0)
    good = section.desirable_weight * jax.nn.sigmoid(-section.beta * (answers.log_ratios - kl))
    bad = section.undesirable_weight * jax.nn.sigmoid(-section.beta * (kl - answers.log_ratios))
    total = jnp.sum(answers.exists * jnp.where(answers.good > 0, good, bad))
    metrics = _metrics(section, answers, step) | drift_metric(batch, routers, reference)
    metrics["kl"] = Mean(kl * jnp.sum(answers.exists), jnp.sum(answers.exists))
    metrics["entropy"] = Mean(jnp.sum(jnp.where(_own(batch), outputs.entropy, 0)), jnp.sum(_own(batch)))
    return Terms(total, metrics, routers)


def _own(batch: Any) -> Bool[Array, "B T"]:
    """Return the targets that belong to labelled answers."""
    return batch.loss_mask & (batch.segment_ids != 0)


def _metrics(section: config.UnpairedPreference, answers: _Answers, step: StepSums) -> dict[str, Metric]:
    """Return rewards and log-probabilities of good (chosen) and bad (rejected) answers under TRL's names."""
    metrics: dict[str, Metric] = {}
    rewards = jax.lax.stop_gradient(section.beta * answers.log_ratios)
    margin = jnp.float32(0)
    bad = answers.exists * (1 - answers.good)
    for name, weights, in_step, sign in (
        ("chosen", answers.good, step.good, 1),
        ("rejected", bad, step.answers - step.good, -1),
    ):
        count = jnp.sum(weights)
        metrics[f"rewards/{name}"] = Mean(jnp.sum(weights * rewards), count)
        metrics[f"logps/{name}"] = Mean(jnp.sum(weights * jax.lax.stop_gradient(answers.logps)), count)
        margin += sign * divide(jnp.sum(weights * rewards), in_step)
    # The difference of two means over the step, weighted so that microbatches add up to it.
    metrics["rewards/margins"] = Mean(margin * step.answers, jnp.sum(answers.exists))
    return metrics
