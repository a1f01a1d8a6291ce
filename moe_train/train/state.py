"""The training state: everything that a run carries from step to step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath
from moe_train.train.spike_guard import GuardState

Leaf = TypeVar("Leaf")
"""Array of a model, or its shape: how parameters are split depends on their paths only."""


class TrainState(NamedTuple):
    """The state of a training run.

    `trainable`, `frozen` and `buffers` are flat dicts {path: array}; full training and LoRA differ only in the split.
    """

    step: Int[Array, ""]
    """Number of optimizer steps tried (int32); it is the position in the data."""
    trainable: Parameters
    frozen: Parameters
    buffers: Parameters
    """Arrays that are changed after each step by a rule and not by a gradient: the routers' biases."""
    opt_state: Any
    skipped: Int[Array, ""]
    """Number of steps whose update was left out or undone: not finite, or a spike (int32)."""
    guard: GuardState | None = None
    """Recent losses and counts of the spike guard; None without one."""
    learning_rates: dict[str, Float[Array, ""]] | None = None
    """Learning rates after warm-up (`optimizer.rate_arrays`), as arguments of the compiled step, so that runs that differ in them
    share a program; None for the constants of the optimizer. A checkpoint does not store them: a run has those of its config.
    """

    @property
    def learned(self) -> dict[str, Any]:
        """All arrays of the model that a step may change: the part of the model that a checkpoint stores.

        In a state of shapes (`jax.eval_shape`) these are shapes too.
        """
        return self.trainable | self.buffers


def partition(
    params: dict[str, Leaf], lora: config.Lora | None, trained_tower: Collection[str] = ()
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Split the parameters into (learned, frozen).

    With a `lora` section, the adapters and the modules that it trains in full are learned; without one, all text parameters are,
    and the modules of a tower and its projector that a pattern names. A router's bias goes with its router.

    Args:
        params: parameters, or their shapes, by path.
        lora: the section of the adapters; None for full training.
        trained_tower: patterns of full training (`vision.train` or `audio.train`).
    """
    learned: dict[str, Leaf] = {}
    for name, x in params.items():
        path = ParameterPath.parse(name)
        if lora is not None:
            is_learned = path.is_trained(lora)
        else:
            is_learned = not path.is_tower or any(config.names_module(pattern, path.module) for pattern in trained_tower)
        if is_learned:
            learned[name] = x
    return learned, {path: x for path, x in params.items() if path not in learned}


def split_buffers(learned: dict[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Split the learned parameters into (trainable, buffers)."""
    buffers = {path: x for path, x in learned.items() if ParameterPath.parse(path).is_router_bias}
    return {path: x for path, x in learned.items() if path not in buffers}, buffers


def trained_in_full(learned: dict[str, Leaf], lora: config.Lora | None) -> dict[str, Leaf]:
    """Return the parameters that are trained together with adapters but are not adapters; empty without a `lora` section."""
    return {} if lora is None else {path: x for path, x in learned.items() if not ParameterPath.parse(path).is_adapter}


def create_state(
    params: Parameters,
    optimizer: optax.GradientTransformation,
    lora: config.Lora | None = None,
    trained_tower: Collection[str] = (),
) -> TrainState:
    """Create a state at step 0 from all parameters, which `partition` splits."""
    learned, frozen = partition(params, lora, trained_tower)
    return state_of_learned(learned, optimizer)._replace(frozen=frozen)


def state_of_learned(learned: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """Create a state at step 0 without frozen parameters; the optimizer's moments inherit the sharding of their weights."""
    trainable, buffers = split_buffers(learned)
    # Two arrays and not one: a donated state must not contain the same buffer twice.
    step = jnp.zeros((), jnp.int32, out_sharding=P())
    skipped = jnp.zeros((), jnp.int32, out_sharding=P())
    return TrainState(step, trainable, {}, buffers, optimizer.init(trainable), skipped)
