"""Losses that several test files minimise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Objective, ObjectiveInputs, Terms
from moe_train.train.token_logprobs import batch_logprobs
from tests.train.tiny_step import V

COEFS = config.Loss(load_balance_loss_coef=0.5, router_z_loss_coef=0.1)


def divergence() -> Objective:
    """KL divergence from the reference model, by the estimator exp(d) - 1 - d."""

    def loss(inputs: ObjectiveInputs, of_step: Any) -> Terms:
        assert inputs.reference is not None
        outputs, routers = batch_logprobs(inputs.model, inputs.batch, inputs.key)
        reference, _ = batch_logprobs(inputs.reference, inputs.batch)
        difference = reference.logprob - outputs.logprob
        values = (jnp.expm1(difference) - difference) * inputs.batch.loss_mask
        return Terms(jnp.sum(values), {"difference": jnp.sum(jnp.abs(difference) * inputs.batch.loss_mask)}, routers)

    return Objective(Batch, next_token().weight, loss, "divergence", "tokens", uses_reference=True)


def by_hand(model: Any, batch: Any, key: Any) -> tuple[Any, ...]:
    """Cross-entropy, with the routers' statistics."""
    hidden, routers = model(batch.tokens, batch.positions, batch.segment_ids, key)
    at_target = jnp.where(batch.targets[..., None] == jnp.arange(V), jax.nn.log_softmax(model.logits(hidden)), 0)
    total = -jnp.sum(jnp.sum(at_target, axis=-1) * batch.loss_mask)
    return total, jnp.sum(batch.loss_mask), {"rows": jnp.int32(batch.tokens.shape[0])}, routers
