"""Distillation: the divergence of the student's predictions from a teacher's stored ones.

With p the teacher, q the student, both at the temperature, and i over the teacher's k most likely tokens and the rest as one
more outcome: forward sum p_i log(p_i / q_i); reverse sum q_i log(q_i / p_i); js b KL(p, m) + (1 - b) KL(q, m) with
m = b p + (1 - b) q (Agarwal et al. 2023, arXiv:2306.13649, eq. 1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_train import config
from moe_train.data.batches.distillation_batch import distillation_batch
from moe_train.model.layers import keys_of
from moe_train.train.chosen_logprobs import ChosenLogprobs, chosen_logprobs
from moe_train.train.objectives.next_token import count_loss_tokens
from moe_train.train.objectives.objective import Mean, Objective, ObjectiveInputs, Terms

NO_MASS = -100.0
"""Stands for the log-probability of an outcome without mass; finite, so that its products with 0 are 0."""


def distillation(section: config.Distillation) -> Objective:
    """Return the objective of a config section."""
    batch_type = distillation_batch(section.top_k, section.temperature)
    return Objective(batch_type, count_loss_tokens, partial(loss, section), "distillation_loss", "loss_tokens")


def loss(section: config.Distillation, inputs: ObjectiveInputs, first_pass_result: Any) -> Terms:
    """Sum divergence and weighted cross-entropy, in nats, over the tokens that are trained on."""
    model = inputs.model
    batch = inputs.batch
    body_key, head_key = keys_of(inputs.key, 2)
    hidden_BTD, routers = model(batch.tokens, batch.positions, batch.segment_ids, body_key)
    head_VD = model.head_weight()
    if section.top_k > head_VD.shape[0]:
        raise ValueError(f"objective.top_k {section.top_k} is more than the model's vocab_size {head_VD.shape[0]}; lower it")
    lora_factors = model.head_lora_factors(hidden_BTD, head_key)
    student = chosen_logprobs(hidden_BTD, head_VD, batch.teacher_ids, batch.targets, section.temperature, lora_factors)
    has_tail = section.top_k < head_VD.shape[0]
    teacher_BTn = teacher_outcomes(batch.teacher_logprobs, batch.teacher_tail, has_tail)
    divergence_BT = divergence(section, teacher_BTn, student_outcomes(student, has_tail))
    if section.times_squared_temperature:
        divergence_BT *= section.temperature**2
    total_BT = divergence_BT
    if section.ce_weight:
        total_BT = total_BT - section.ce_weight * student.target
    tokens = count_loss_tokens(batch, None)

    def mean(values_BT: Float[Array, "B T"]) -> Mean:
        # Selected and not multiplied: a position that is not trained on may hold anything.
        return Mean(jnp.sum(jnp.where(batch.loss_mask, values_BT, 0)), tokens)

    top_BT = teacher_BTn[..., : section.top_k]
    metrics = {
        "divergence": mean(divergence_BT),
        "cross_entropy": mean(-student.target),
        "entropy": mean(student.entropy),
        "teacher_mass": mean(jnp.sum(jnp.exp(top_BT), axis=-1)),
        "student_mass": mean(jnp.sum(jnp.exp(student.chosen), axis=-1)),
        # The teacher's tokens are in descending order. Equal at a tie, which float32 logits rarely have.
        "agreement": mean((student.chosen[..., 0] >= student.largest - 1e-6).astype(jnp.float32)),
    }
    return Terms(mean(total_BT).sum, jax.lax.stop_gradient(metrics), routers)


def teacher_outcomes(logprobs_BTk: Float[Array, "B T k"], tail_BT: Float[Array, "B T"], has_tail: bool) -> Float[Array, "B T n"]:
    """Return the teacher's log-probabilities of its tokens and, with `has_tail`, of the rest.

    They are normalized again, since stored values are rounded: a student equal to the teacher has a divergence of 0.
    """
    outcomes_BTn = logprobs_BTk.astype(jnp.float32)
    if has_tail:
        tail_BT1 = jnp.maximum(tail_BT, NO_MASS)[..., None]
        outcomes_BTn = jnp.concatenate([outcomes_BTn, tail_BT1], axis=-1)
    return jax.nn.log_softmax(outcomes_BTn, axis=-1)


def student_outcomes(student: ChosenLogprobs, has_tail: bool) -> Float[Array, "B T n"]:
    """Return the student's log-probabilities of the teacher's tokens and, with `has_tail`, of the rest."""
    if not has_tail:
        return student.chosen
    return jnp.concatenate([student.chosen, student.tail[..., None]], axis=-1)


def divergence(
    section: config.Distillation, teacher_BTn: Float[Array, "B T n"], student_BTn: Float[Array, "B T n"]
) -> Float[Array, "B T"]:
    """Return the divergence at each position.

    Args:
        section: which divergence.
        teacher_BTn: log-probabilities of all outcomes.
        student_BTn: log-probabilities of the same outcomes.
    """
    match section.divergence:
        case "forward":
            return _kl(teacher_BTn, student_BTn)
        case "reverse":
            return _kl(student_BTn, teacher_BTn)
        case "js":
            beta = section.beta
            mixture_BTn = jnp.logaddexp(student_BTn + jnp.log1p(-beta), teacher_BTn + jnp.log(beta))
            return beta * _kl(teacher_BTn, mixture_BTn) + (1 - beta) * _kl(student_BTn, mixture_BTn)


def _kl(p_BTn: Float[Array, "B T n"], q_BTn: Float[Array, "B T n"]) -> Float[Array, "B T"]:
    """Return sum p log(p / q) of log-probabilities."""
    return jnp.sum(jnp.exp(p_BTn) * (p_BTn - q_BTn), axis=-1)
