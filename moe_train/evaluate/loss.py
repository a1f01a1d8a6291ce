"""Sums of the cross-entropy over batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_train.model.parameters import Parameters, combine
from moe_train.model.transformer import Transformer
from moe_train.train.cross_entropy import cross_entropy_sum


def batch_sums(params: Parameters, frozen: Parameters, batch: Any, structure: Any) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropy, loss-bearing tokens) of a batch."""
    model = combine(structure, params, frozen)
    hidden_BTD, _ = model(batch.tokens, batch.positions, batch.segment_ids)
    return _batch_sums(model, hidden_BTD, batch)


def _batch_sums(model: Transformer, hidden_BTD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    beside = model.beside_head(hidden_BTD)
    total = cross_entropy_sum(hidden_BTD, model.head_weight(), batch.targets, batch.loss_mask, beside)
    return total, jnp.sum(batch.loss_mask)


def make_batch_sums(structure: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`batch_sums` of a model's structure, compiled once for all evaluations of a run."""
    return jax.jit(partial(batch_sums, structure=structure))
