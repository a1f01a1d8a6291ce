"""Classification of packed texts by a linear head at the last token of each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.data.batches.classification_batch import classification_batch
from moe_train.train.objectives.objective import Mean, Objective, ObjectiveInputs, Terms


def classification(section: config.Classification) -> Objective:
    """Return the objective of a config section."""
    batch_type = classification_batch(section.targets)
    return Objective(batch_type, count_texts, partial(loss, section), "classification_loss", "texts")


def count_texts(batch: Any, first_pass_result: Any) -> Int[Array, ""]:
    """Return the number of texts."""
    return jnp.sum(batch.is_last, dtype=jnp.int32)


def loss(section: config.Classification, inputs: ObjectiveInputs, first_pass_result: Any) -> Terms:
    """Sum the losses of all targets over the texts.

    A target with exactly one label has the cross-entropy of its softmax; one with several has the mean over its labels of a binary
    cross-entropy, as `problem_type` of transformers.
    """
    batch = inputs.batch
    hidden_BTD, routers = inputs.model(batch.tokens, batch.positions, batch.segment_ids, inputs.key)
    scores_BTY = inputs.model.logits(hidden_BTD)
    total = jnp.float32(0)
    metrics: dict[str, Mean] = {}
    start = 0
    for target in section.targets:
        stop = start + len(target.labels)
        logits_BTY = scores_BTY[..., start:stop]
        labels_BTY = batch.labels[..., start:stop]
        start = stop
        # A target without labels counts nothing for this text.
        is_known = batch.is_last & (labels_BTY[..., 0] >= 0)
        losses_BT, correct_BT = target_loss(target, logits_BTY, labels_BTY)
        count = jnp.sum(is_known, dtype=jnp.int32)
        # Selected and not multiplied: other positions may hold anything.
        total += jnp.sum(jnp.where(is_known, losses_BT, 0))
        suffix = f"/{target.name}" if len(section.targets) > 1 else ""
        metrics[f"accuracy{suffix}"] = Mean(jnp.sum(jnp.where(is_known, correct_BT, 0)), count)
    return Terms(total, jax.lax.stop_gradient(metrics), routers)


def target_loss(
    target: config.ScoreTarget, logits_BTY: Float[Array, "B T Y"], labels_BTY: Float[Array, "B T Y"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the loss of one target, and whether its prediction is right (1 or 0), at every position.

    Of a target with several labels, all of them have to be right.
    """
    if target.several:
        losses_BTY = jax.nn.softplus(logits_BTY) - labels_BTY * logits_BTY
        correct_BT = jnp.all((logits_BTY > 0) == (labels_BTY > 0), axis=-1)
        return jnp.mean(losses_BTY, axis=-1), correct_BT.astype(jnp.float32)
    losses_BT = jax.nn.logsumexp(logits_BTY, axis=-1) - jnp.sum(labels_BTY * logits_BTY, axis=-1)
    correct_BT = jnp.argmax(logits_BTY, axis=-1) == jnp.argmax(labels_BTY, axis=-1)
    return losses_BT, correct_BT.astype(jnp.float32)
