"""Next-token prediction: cross-entropy over the tokens of the loss mask."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_train.data.batches.batch import Batch, PackedBatch
from moe_train.data.batches.feature_batch import FeatureBatch
from moe_train.data.batches.media_batch import MediaBatch
from moe_train.model.encoders.media import Features, Media
from moe_train.model.layers import keys_of
from moe_train.train.cross_entropy import cross_entropy_sum
from moe_train.train.objectives.objective import Objective, ObjectiveInputs, Terms


def next_token(batch_type: type[PackedBatch] = Batch) -> Objective:
    """Return the next-token objective, whose batch type is `Batch`, or one with pictures or sound."""
    return Objective(batch_type, count_loss_tokens, loss, mean_name="cross_entropy", weight_name="loss_tokens")


def count_loss_tokens(batch: Any, first_pass_result: Any) -> Int[Array, ""]:
    """Return the number of tokens that are trained on."""
    return jnp.sum(batch.loss_mask)


def loss(inputs: ObjectiveInputs, first_pass_result: Any) -> Terms:
    """Sum the cross-entropy, in nats, over the tokens that are trained on."""
    model = inputs.model
    batch = inputs.batch
    body_key, head_key = keys_of(inputs.key, 2)
    hidden_BTD, routers = model(
        batch.tokens, batch.positions, batch.segment_ids, body_key, media=media_of(batch), features=features_of(batch)
    )
    lora_factors = model.head_lora_factors(hidden_BTD, head_key)
    total = cross_entropy_sum(hidden_BTD, model.head_weight(), batch.targets, batch.loss_mask, lora_factors)
    return Terms(total, {}, routers)


def media_of(batch: Any) -> Media | None:
    """Return the pictures or the sound of a batch; None for a batch type without either."""
    if not isinstance(batch, MediaBatch):
        return None
    arrays: Any = batch  # those of JAX in a step, where the type of the batch names NumPy's
    return Media(arrays.units, arrays.places, arrays.ids, arrays.feature_index)


def features_of(batch: Any) -> Features | None:
    """Return the stored features of a batch; None for a batch type without any."""
    if not isinstance(batch, FeatureBatch):
        return None
    arrays: Any = batch  # as in `media_of`
    return Features(arrays.features, arrays.feature_index)
