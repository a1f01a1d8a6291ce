"""Reward models: a score at the last token of each answer of a pair (Bradley-Terry)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.train.objectives.answer_sums import count_pairs, pairs_of, sum_by_answer
from moe_train.train.objectives.objective import Mean, Objective, ObjectiveInputs, Terms


def reward(section: config.Reward) -> Objective:
    """Return the objective of a config section."""
    return Objective(RewardBatch, _count, partial(loss, section), "reward_loss", "pairs")


def _count(batch: Any, first_pass_result: Any) -> Int[Array, ""]:
    """Return the number of pairs."""
    return count_pairs(batch.answer_ids)


def loss(section: config.Reward, inputs: ObjectiveInputs, first_pass_result: Any) -> Terms:
    """Sum -log sigmoid(chosen - rejected - margin) + center_weight * (chosen + rejected)² over the pairs."""
    batch = inputs.batch
    hidden_BTD, routers = inputs.model(batch.tokens, batch.positions, batch.segment_ids, inputs.key)
    scores_BT = jnp.where(batch.is_last, inputs.model.logits(hidden_BTD)[..., 0], 0)
    chosen_BP, rejected_BP = pairs_of(sum_by_answer(scores_BT, batch.answer_ids))
    margins_BP, _ = pairs_of(sum_by_answer(batch.margins, batch.answer_ids))
    is_pair_BP, _ = pairs_of(sum_by_answer(batch.is_last.astype(jnp.float32), batch.answer_ids))
    is_pair_BP = is_pair_BP > 0
    difference_BP = chosen_BP - rejected_BP
    losses_BP = jax.nn.softplus(margins_BP - difference_BP) + section.center_weight * jnp.square(chosen_BP + rejected_BP)
    pairs = jnp.sum(is_pair_BP, dtype=jnp.int32)

    def mean(values_BP: Float[Array, "B P"]) -> Mean:
        return Mean(jnp.sum(jnp.where(is_pair_BP, values_BP, 0)), pairs)

    metrics = {
        "accuracy": mean((difference_BP > 0).astype(jnp.float32)),
        "margin": mean(difference_BP),
        "rewards/chosen": mean(chosen_BP),
        "rewards/rejected": mean(rejected_BP),
    }
    return Terms(mean(losses_BP).sum, jax.lax.stop_gradient(metrics), routers)
