"""Optimizers and learning-rate schedules, built from Optax.

Every optimizer is one chain: clip the gradient's global norm, turn it into a direction, add decoupled weight decay, multiply
by the learning rate. Which weights decay, and which are matrices for Muon, is decided by a weight's path only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.train.muon import matrix_dims, orthogonalize
from moe_train.train.rounding import with_rounding


def make_schedule(schedule: config.Schedule, peak: float | Float[Array, ""], total_steps: int) -> optax.Schedule:
    """Return the learning rate of step i = 0 … total_steps - 1.

    Warm-up is peak * (i + 1) / warmup_steps. The schedule's decay follows, and reaches its final fraction at the last step.

    Args:
        schedule: schedule section of the config.
        peak: learning rate after warm-up.
        total_steps: steps of the run.

    Raises:
        ValueError: warm-up and decay are longer than the run.
    """
    first = max(schedule.warmup_steps - 1, 0)  # index of the first step at the peak
    fall = total_steps - 1 - first  # steps from the peak to the last step
    decay = schedule.decay_steps if isinstance(schedule, config.WsdSchedule) else 0
    if schedule.warmup_steps + decay > total_steps:
        and_decay = f" and decay_steps {decay}" if decay else ""
        raise ValueError(
            f"optimizer.schedule: warmup_steps {schedule.warmup_steps}{and_decay} exceed the {total_steps} steps of the run"
        )
    match schedule:
        case config.ConstantSchedule():
            after = optax.constant_schedule(peak)
        case config.CosineSchedule():
            # Optax requires at least one step of decay, but a run may end at its peak.
            after = optax.cosine_decay_schedule(peak, max(fall, 1), schedule.final_fraction)
        case config.LinearSchedule():
            after = optax.linear_schedule(peak, peak * schedule.final_fraction, max(fall, 1))
        case config.WsdSchedule():
            # Stays at the peak until `decay` steps before the last one.
            after = optax.linear_schedule(peak, peak * schedule.final_fraction, decay, transition_begin=fall - decay)
    if not first:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / schedule.warmup_steps, peak, first), after], [first])


Part = Literal["main", "other"]
"""Weights with a learning rate of their own: `other` are those that Muon leaves to AdamW."""


def peak_rates(optimizer: config.Optimizer) -> dict[Part, float]:
    """Return the learning rate after warm-up of each part of the weights."""
    rates: dict[Part, float] = {"main": optimizer.learning_rate}
    if isinstance(optimizer, config.Muon):
        rates["other"] = optimizer.adamw_learning_rate
    return rates


def rate_arrays(optimizer: config.Optimizer) -> dict[str, Float[Array, ""]]:
    """Return `peak_rates` as arrays on the mesh in force, for `TrainState.learning_rates`."""
    return {part: jnp.full((), rate, jnp.float32, out_sharding=P()) for part, rate in peak_rates(optimizer).items()}


def _scale_by_rate(
    schedule: Callable[..., optax.Schedule], part: Part, stated_peak: float
) -> optax.GradientTransformationExtraArgs:
    """Return the multiplication of updates by minus the learning rate.

    Args:
        schedule: returns the schedule of a peak.
        part: which of the peaks in the extra argument `learning_rates` counts.
        stated_peak: the peak where that argument is not given; it is a constant of the compiled program.

    Raises:
        ValueError: the schedule does not fit the run.
    """
    schedule(peak=stated_peak)  # now, and not when the step is traced

    def init(_params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: optax.ScaleByScheduleState,
        params: Any = None,
        *,
        learning_rates: Mapping[str, Any] | None = None,
        **_extra: Any,
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        peak = stated_peak if learning_rates is None else learning_rates[part]
        rate = schedule(peak=peak)(state.count)
        scaled = jax.tree.map(lambda g: jnp.array(-rate, dtype=g.dtype) * g, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(optimizer: config.Optimizer, total_steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a config section, which works on flat dicts {path: array}.

    Args:
        optimizer: optimizer section of the config.
        total_steps: steps of the run, for the schedule.

    Raises:
        ValueError: the schedule does not fit `total_steps` (see `make_schedule`).
    """
    rate = partial(make_schedule, optimizer.schedule, total_steps=total_steps)
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=partial(decay_mask, no_decay=optimizer.no_decay))
    clip = optax.identity() if optimizer.max_grad_norm is None else optax.clip_by_global_norm(optimizer.max_grad_norm)

    peaks = peak_rates(optimizer)

    def with_rate(direction: optax.GradientTransformation, part: Part) -> optax.GradientTransformation:
        return optax.chain(direction, decay, _scale_by_rate(rate, part, peaks[part]))

    match optimizer:
        case config.AdamW(b1=b1, b2=b2, eps=eps):
            update = with_rate(optax.scale_by_adam(b1, b2, eps), "main")
        case config.Lion(b1=b1, b2=b2):
            update = with_rate(optax.scale_by_lion(b1, b2), "main")
        case config.Adafactor():
            # Without momentum, as in the paper. The root mean squares are taken over a whole stack of layers.
            factored = optax.scale_by_factored_rms(
                decay_rate=optimizer.decay_rate, min_dim_size_to_factor=optimizer.min_dim_size_to_factor
            )
            direction = optax.chain(factored, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
            update = with_rate(direction, "main")
        case config.Muon(b1=b1, b2=b2, eps=eps):
            momentum = optax.trace(optimizer.momentum, optimizer.nesterov)
            orthogonal = optax.stateless(lambda updates, _: orthogonalize(updates, optimizer.ns_steps))
            parts = {
                "matrix": with_rate(optax.chain(momentum, orthogonal), "main"),
                "other": with_rate(optax.scale_by_adam(b1, b2, eps), "other"),
            }
            # Muon applies to matrices only; embeddings, head, router and norms use AdamW with a learning rate of their own.
            update = optax.partition(parts, lambda params: {p: "matrix" if matrix_dims(p) else "other" for p in params})
    # The norm is that of all gradients, so clipping comes before Muon's split into matrices and others.
    return with_rounding(optax.chain(clip, update), optimizer.rounding)


def make_optimizer_of_any_length(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Return the optimizer of a config section with a constant learning rate, for measuring or planning a step.

    A constant schedule costs as much as any other and, unlike the others, fits a run of any number of steps.
    """
    constant = config.ConstantSchedule(name="constant")
    return make_optimizer(optimizer.model_copy(update={"schedule": constant}), total_steps=1)


def decay_mask(params: Mapping[str, Any], no_decay: tuple[str, ...]) -> dict[str, bool]:
    """Return {path: whether weight decay applies}.

    Args:
        params: parameters by path.
        no_decay: kinds of parameters without decay, as in the config.
    """
    return {path: ParameterPath.parse(path).kind not in no_decay for path in params}
