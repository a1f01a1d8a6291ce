"""Next-token prediction: cross-entropy and the routers' losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from moe_train import config
from moe_train.model.layers import keys_of
from moe_train.model.moe.router import RouterStats
from moe_train.model.sharding.specs import over_replicas
from moe_train.model.transformer import Transformer
from moe_train.train.cross_entropy import cross_entropy_sum


class LossParts(NamedTuple):
    """Sums and figures of one microbatch."""

    cross_entropy_sum: Array
    loss_tokens: Array
    routers: RouterStats | None


def microbatch_loss(
    model: Transformer, batch: Any, loss_tokens: Array, microbatches: int, coefs: config.Loss, key: Array | None = None
) -> tuple[Array, LossParts]:
    """This microbatch's share of the step's loss.

    batch: the five (B, T) arrays of a `Batch`; loss_tokens: the number of loss-bearing tokens in the whole
    optimizer step. The shares of all microbatches sum to: mean cross-entropy over those tokens + the routers'
    losses, summed over layers, averaged over microbatches. key: of the adapters' dropout.
    """
    body_key, head_key = keys_of(key, 2)
    hidden_BTD, routers = model(batch.tokens, batch.positions, batch.segment_ids, body_key)
    beside = model.beside_head(hidden_BTD, head_key)
    total = over_replicas(cross_entropy_sum(hidden_BTD, model.head_weight(), batch.targets, batch.loss_mask, beside))
    loss = total / jnp.maximum(loss_tokens, 1)
    if routers is not None:
        balance = (coefs.load_balance_loss_coef or 0.0) * jnp.sum(routers.load_balance_loss)
        z = (coefs.router_z_loss_coef or 0.0) * jnp.sum(routers.router_z_loss)
        loss += (balance + z) / microbatches
    return loss, LossParts(total, over_replicas(jnp.sum(batch.loss_mask)), routers)
