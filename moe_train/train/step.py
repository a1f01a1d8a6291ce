"""One optimizer step: microbatches, gradients, a finite check, the update."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.compiler_options import compiler_options
from moe_train.machine.mesh import axis_size, batch_axes
from moe_train.model.moe.router import RouterStats, next_bias, over_microbatches
from moe_train.model.parameters import Parameters, combine, with_capacity
from moe_train.model.paths import rows_of_routers
from moe_train.model.sharding.specs import over_replicas
from moe_train.train.objectives.next_token import LossParts, microbatch_loss
from moe_train.train.state import TrainState


class StepMetrics(NamedTuple):
    """Figures of one step, on the device until somebody reads them."""

    loss: Array
    """What was minimised: cross-entropy + the routers' losses."""
    cross_entropy: Array
    """Mean over the loss-bearing tokens of the step, in nats."""
    loss_tokens: Array
    grad_norm: Array
    """Global norm before clipping."""
    finite: Array
    """False: loss or gradient were not finite, and the update was skipped."""
    routers: RouterStats | None
    """(L, …), averaged over microbatches (counts: summed); None for a dense model."""


def train_step(
    state: TrainState,
    batch: Batch,
    structure: Any,
    optimizer: optax.GradientTransformation,
    loss: config.Loss,
    microbatches: int = 1,
    dropout_seed: int | None = None,
    gradient_dtype: jnp.dtype | None = None,
) -> tuple[TrainState, StepMetrics]:
    """`structure` is the model's (see `transformer.parameters`); batch holds global (B, T) arrays.

    dropout_seed: of the adapters' dropout, with the step; None where they have none. gradient_dtype: in which accumulated
    gradients go from replica to replica; None: in the parameters' own.
    """
    loss_tokens = jnp.sum(batch.loss_mask)
    key = None
    if dropout_seed is not None:  # one kind of generator, so that masks do not depend on the platform
        key = jax.random.fold_in(jax.random.key(dropout_seed, impl="threefry2x32"), state.step)

    def objective(trainable: Parameters, fixed: Any, part: Batch, key: Array | None) -> tuple[Array, LossParts]:
        buffers, frozen, loss_tokens = fixed
        model = combine(structure, trainable, buffers, frozen)
        return microbatch_loss(model, part, loss_tokens, microbatches, loss, key)

    weights = state.trainable, (state.buffers, state.frozen, loss_tokens)
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    (value, parts), grads = _accumulate(value_and_grad, weights, batch, key, microbatches, gradient_dtype)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    state = TrainState(
        step=state.step + 1,
        trainable=jax.tree.map(keep, optax.apply_updates(state.trainable, updates), state.trainable),
        frozen=state.frozen,
        buffers=jax.tree.map(keep, _balanced(state.buffers, parts.routers, loss.bias_update_rate), state.buffers),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    cross_entropy = parts.cross_entropy_sum / jnp.maximum(parts.loss_tokens, 1)
    return state, StepMetrics(value, cross_entropy, parts.loss_tokens, grad_norm, finite, parts.routers)


def _balanced(buffers: Parameters, routers: RouterStats | None, rate: float | None) -> Parameters:
    """The routers' biases after a step with these loads."""
    if not buffers:
        return {}
    assert routers is not None and rate is not None
    rows = rows_of_routers({path: len(bias) for path, bias in buffers.items()})
    return {path: next_bias(bias, routers.chosen_E[rows[path]], rate) for path, bias in buffers.items()}


def compile_step(
    run: config.Run, structure: Any, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> jax.stages.Compiled:
    """`train_step` of a run, compiled for a state (which it takes over) and a batch like these."""
    step_of = partial(
        train_step,
        structure=with_capacity(structure, run.train.capacity_factor),
        optimizer=optimizer,
        loss=run.loss,
        microbatches=run.train.microbatches,
        dropout_seed=run.seed if run.lora and run.lora.dropout else None,
        gradient_dtype=jnp.dtype(run.compute.dtype),
    )
    device = jax.sharding.get_abstract_mesh().abstract_device
    options = compiler_options("" if device is None else device.device_kind)
    return jax.jit(step_of, donate_argnums=0).lower(state, batch).compile(options or None)


def _accumulate(
    value_and_grad: Any,
    weights: tuple[Parameters, Any],
    batch: Batch,
    key: Array | None,
    microbatches: int,
    gradient_dtype: jnp.dtype | None,
) -> Any:
    """Sum of ((loss, parts), gradients) over microbatches, in float32; the gradients have the parameters' dtype.

    weights: (those that gradients are wanted of, all else that the loss needs). With several replicas (the axis `data`,
    over the slow network) each one sums the gradients of its own rows, and the sums of all meet once, in gradient_dtype;
    those of a single microbatch meet in the dtype of the computation: bfloat16 of matrices, float32 of norms and routers,
    which are small and computed in it.
    """
    if microbatches == 1:
        return value_and_grad(*weights, batch, key)
    run = partial(_accumulate_here, value_and_grad, microbatches=microbatches)
    if axis_size("data") == 1:
        return run(weights, batch, key)
    # The check is off: where it is on, JAX 0.10 to 0.12 give what a shard_map in here saves for its backward pass a spec
    # that names `data` twice.
    run, in_specs = partial(run, gradient_dtype=gradient_dtype), (P(), P("data"), P())
    return jax.shard_map(run, in_specs=in_specs, out_specs=P(), axis_names={"data"}, check_vma=False)(weights, batch, key)


def _accumulate_here(
    value_and_grad: Any,
    weights: tuple[Parameters, Any],
    batch: Batch,
    key: Array | None,
    microbatches: int,
    gradient_dtype: jnp.dtype | None = None,
) -> Any:
    """Of all rows; inside a `shard_map` over `data`, gradients of this replica's rows, which are summed at the end."""

    def without_routers(result: Any) -> Any:
        (value, parts), grads = result
        return (value, parts._replace(routers=None)), grads

    def one(total: Any, part_and_key: Any) -> tuple[Any, RouterStats | None]:
        result = value_and_grad(*weights, *part_and_key)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, without_routers(result)), result[0][1].routers

    # Sequence i of microbatch j is row i * microbatches + j: each device splits its own rows, whatever the mesh.
    parts = jax.tree.map(lambda x: _split_rows(x, microbatches), batch)
    keys = None if key is None else jax.random.split(key, microbatches)
    shapes = without_routers(jax.eval_shape(value_and_grad, *weights, jax.tree.map(lambda x: x[0], parts), key))
    wide = lambda dtype: jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype  # noqa: E731
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype), out_sharding=s.sharding), shapes)
    ((value, sums), grads), routers = jax.lax.scan(one, zeros, (parts, keys))
    routers = None if routers is None else over_microbatches(routers)
    grads = over_replicas(jax.tree.map(lambda g, x: g.astype(gradient_dtype or x.dtype), grads, weights[0]))
    return (value, sums._replace(routers=routers)), jax.tree.map(lambda g, x: g.astype(x.dtype), grads, weights[0])


def _split_rows(x: Array, microbatches: int) -> Array:
    spec = P(batch_axes(), None, "context")
    split = jax.lax.reshape(x, (x.shape[0] // microbatches, microbatches, *x.shape[1:]), out_sharding=spec)
    return jnp.moveaxis(split, 1, 0)
