"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.model.lora import is_trainable
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


def partition(params: Parameters, lora: config.Lora | None) -> tuple[Parameters, Parameters]:
    """(trainable, frozen): with the section `lora` the adapters and what it trains in full, otherwise everything."""
    if lora is None:
        return params, {}
    trainable = {path: x for path, x in params.items() if is_trainable(path, lora)}
    return trainable, {path: x for path, x in params.items() if path not in trainable}


def create_state(params: Parameters, optimizer: optax.GradientTransformation, lora: config.Lora | None = None) -> TrainState:
    """A state at step 0; moments inherit the sharding of their weights."""
    trainable, frozen = partition(params, lora)
    zero = lambda: jnp.zeros((), jnp.int32, out_sharding=P())  # noqa: E731
    return TrainState(zero(), trainable, frozen, optimizer.init(trainable), zero())
