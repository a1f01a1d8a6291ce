"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath


class TrainState(NamedTuple):
    """`trainable` and `frozen` are flat dicts {path: array}; full training and LoRA differ only in the split."""

    step: jax.Array
    """Optimizer steps tried, int32: the position in the data."""
    trainable: Parameters
    frozen: Parameters
    buffers: Parameters
    """What a rule moves after each step, and no gradient: the routers' biases."""
    opt_state: Any
    skipped: jax.Array
    """Steps whose loss or gradient was not finite and changed nothing, int32."""

    @property
    def learned(self) -> Parameters:
        """All that a step may change of the model: what a checkpoint holds of it."""
        return self.trainable | self.buffers


def partition(params: Parameters, lora: config.Lora | None) -> tuple[Parameters, Parameters]:
    """(learned, frozen): with the section `lora` the adapters and what it trains in full, otherwise everything. A router's
    bias goes with its router."""
    if lora is None:
        return params, {}
    learned = {path: x for path, x in params.items() if ParameterPath.parse(path).is_trained(lora)}
    return learned, {path: x for path, x in params.items() if path not in learned}


def split_buffers(learned: Parameters) -> tuple[Parameters, Parameters]:
    """(trainable, buffers)."""
    buffers = {path: x for path, x in learned.items() if ParameterPath.parse(path).is_router_bias}
    return {path: x for path, x in learned.items() if path not in buffers}, buffers


def trained_in_full(learned: Parameters, lora: config.Lora | None) -> Parameters:
    """What is trained beside adapters, and not as one; empty without the section `lora`."""
    return {} if lora is None else {path: x for path, x in learned.items() if not ParameterPath.parse(path).is_adapter}


def create_state(params: Parameters, optimizer: optax.GradientTransformation, lora: config.Lora | None = None) -> TrainState:
    """A state at step 0; moments inherit the sharding of their weights."""
    learned, frozen = partition(params, lora)
    trainable, buffers = split_buffers(learned)
    zero = lambda: jnp.zeros((), jnp.int32, out_sharding=P())  # noqa: E731
    return TrainState(zero(), trainable, frozen, buffers, optimizer.init(trainable), zero())
