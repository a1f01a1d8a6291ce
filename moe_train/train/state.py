"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from moe_train.model.lora import is_lora
from moe_train.model.transformer import Parameters


class TrainState(NamedTuple):
    """`trainable` and `frozen` are flat dicts {path: array}; full training and LoRA differ only in the split."""

    step: jax.Array
    """Optimizer steps tried, int32: the position in the data."""
    trainable: Parameters
    frozen: Parameters
    opt_state: Any
    skipped: jax.Array
    """Steps whose loss or gradient was not finite and changed nothing, int32."""


def partition(params: Parameters) -> tuple[Parameters, Parameters]:
    """(trainable, frozen): the adapters and the rest where there are adapters, otherwise everything and nothing."""
    adapters = {path: x for path, x in params.items() if is_lora(path)}
    return (adapters, {path: x for path, x in params.items() if path not in adapters}) if adapters else (params, {})


def create_state(params: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; moments inherit the sharding of their weights."""
    trainable, frozen = partition(params)
    zero = lambda: jnp.zeros((), jnp.int32, out_sharding=P())  # noqa: E731
    return TrainState(zero(), trainable, frozen, optimizer.init(trainable), zero())
