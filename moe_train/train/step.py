"""One optimizer step: gradients, the check that they are finite, and the update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from moe_train.machine.compiler_options import compiler_options
from moe_train.machine.mesh import platform
from moe_train.model.moe.router import RouterStats, next_bias
from moe_train.model.parameters import Parameters
from moe_train.model.paths import router_rows
from moe_train.train.gradients import count_tokens, step_gradients
from moe_train.train.objectives.objective import Mean, ModelWeights, divide, step_metrics
from moe_train.train.rounding import Update, apply_updates
from moe_train.train.spike_guard import Spike, guard_step
from moe_train.train.state import TrainState
from moe_train.train.step_definition import StepDefinition

ROUNDING_STREAM = 1
"""Number of the stream of random bits for rounding; dropout has stream 0."""


class StepMetrics(NamedTuple):
    """Metrics of one step; they stay on the device until they are read."""

    loss: Float[Array, ""]
    """The minimized value: the objective's mean plus the routers' losses."""
    objective: dict[str, Shaped[Array, "..."]]
    """The objective's metrics by name, including its mean and weight."""
    grad_norm: Float[Array, ""]
    """Global gradient norm before clipping."""
    finite: Bool[Array, ""]
    """False if the loss or the gradient norm was not finite, in which case the update was skipped."""
    tokens: Int[Array, ""] | None
    """Number of positions of the batch that are no padding; None for a batch type without `segment_ids`."""
    routers: RouterStats | None
    """Router statistics (L, …), averaged over microbatches (counts are summed); None for a dense model."""
    spike: Spike | None = None
    """What the spike guard found; None without one."""
    vanished: Float[Array, ""] | None = None
    """Share of the bfloat16 weights that an update does not change, since it is rounded away; None without such weights."""


def train_step(
    definition: StepDefinition, state: TrainState, batch: Any, base_weights: Parameters | None = None
) -> tuple[TrainState, StepMetrics]:
    """Take one optimizer step.

    If the loss or the gradient norm is not finite, or a spike, only counters change.

    Args:
        definition: what the step does.
        state: the state before the step.
        batch: global (B, T) arrays of the objective's batch type.
        base_weights: base weights of what is trained in full together with adapters, {path: array}; needed only if the objective
            uses a reference model.

    Returns:
        The new state, and the metrics of the step.
    """
    key = step_key(definition.dropout_seed, state.step)
    fixed = ModelWeights(state.buffers, state.frozen, base_weights or {})
    loss, weight, terms, gradients = step_gradients(definition, state.trainable, fixed, batch, key)
    # Without the barrier XLA:CPU takes the squares here for those of Adam's second moments, and writes them to memory.
    grad_norm = optax.tree.norm(jax.lax.optimization_barrier(gradients) if _is_one_cpu() else gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    guard = state.guard
    spike = None
    applies = finite
    # A state without a guard is one for measuring or planning.
    if definition.spike_guard is not None and guard is not None:
        value = loss if definition.spike_guard.metric == "loss" else grad_norm
        guard, spike = guard_step(definition.spike_guard, guard, value, finite)
        applies = finite & ~spike.is_spike
    (trainable, vanished), opt_state = _apply_optimizer(definition, state, gradients)
    buffers = _updated_biases(state.buffers, terms.routers, definition.router_loss.bias_update_rate)

    trainable = _select(applies, trainable, state.trainable)
    state = TrainState(
        # A skipped step counts too, since `step` is the position in the data.
        step=state.step + 1,
        trainable=trainable,
        frozen=state.frozen,
        buffers=_select(applies, buffers, state.buffers),
        opt_state=_select(_known_after(applies, trainable), opt_state, state.opt_state),
        skipped=state.skipped + jnp.where(applies, 0, 1),
        guard=guard,
        learning_rates=state.learning_rates,
    )
    metrics = {}
    for name, metric in step_metrics(definition.objective, terms, weight).items():
        metrics[name] = divide(*metric) if isinstance(metric, Mean) else metric
    return state, StepMetrics(loss, metrics, grad_norm, finite, count_tokens(batch), terms.routers, spike, vanished)


def _apply_optimizer(definition: StepDefinition, state: TrainState, gradients: Parameters) -> tuple[Update, Any]:
    """Return the weights with the optimizer's update, and its new state."""
    optimizer = optax.with_extra_args_support(definition.optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable, learning_rates=state.learning_rates)
    rounding_key = step_key(definition.rounding_seed, state.step, ROUNDING_STREAM)
    update = apply_updates(definition.rounding, state.trainable, updates, opt_state, rounding_key)
    if _is_one_cpu():
        # Once more, behind a barrier that hides it from XLA:CPU: it would store the new moments for the loops of the weights, and
        # copy them from there to where they belong.
        moments = jax.lax.optimization_barrier(state.opt_state)
        _, opt_state = optimizer.update(gradients, moments, state.trainable, learning_rates=state.learning_rates)
    return update, opt_state


def _select(applies: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return the arrays of `new` if the update applies, and those of `old` if not."""
    # A select and not a branch: the decision stays on the device, and the host need not wait for it.
    return jax.tree.map(lambda new, old: jnp.where(applies, new, old), new, old)


def _known_after(applies: Bool[Array, ""], trainable: Parameters) -> Bool[Array, ""]:
    """Return `applies` as a value that is known only when the new weights are computed, on a mesh of one CPU.

    XLA:CPU computes weights and moments in separate loops. With this order the old moments have no other reader when they are
    overwritten; without it XLA copies all of them first.
    """
    if not _is_one_cpu():
        return applies
    for weights in jax.lax.optimization_barrier(trainable).values():
        first = weights[(0,) * weights.ndim]
        applies &= jnp.isnan(first) | (first <= jnp.inf)  # always true, which XLA does not see
    return applies


def _is_one_cpu() -> bool:
    """Return whether the step runs on one CPU, where the order of its loops was measured."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def step_key(seed: int | None, step: Int[Array | np.ndarray | np.integer, ""], stream: int = 0) -> Key[Array, ""] | None:
    """Return the PRNG key of the step after `step` steps; None without a seed."""
    if seed is None:
        return None
    # One fixed generator implementation, so that random bits do not depend on the platform.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stream) if stream else key, step)


def _updated_biases(buffers: Parameters, routers: RouterStats | None, rate: float | None) -> Parameters:
    """Return the routers' biases after a step with these loads."""
    if not buffers:
        return {}
    assert routers is not None and rate is not None
    rows = router_rows({path: len(bias) for path, bias in buffers.items()})
    return {path: next_bias(bias, routers.chosen_E[rows[path]], rate) for path, bias in buffers.items()}


def compile_step(
    definition: StepDefinition,
    state: TrainState,
    batch: Any,
    base_weights: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct] | None = None,
) -> jax.stages.Compiled:
    """Compile `train_step` for a state, a batch and base weights like these, which may be shapes in place of arrays.

    The compiled step takes over (donates) the state that it is called with.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    options = compiler_options("" if device is None else device.device_kind)
    step = jax.jit(partial(train_step, definition), donate_argnums=0)
    return step.lower(state, batch, base_weights or {}).compile(options or None)
