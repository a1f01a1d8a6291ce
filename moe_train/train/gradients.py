"""Loss and gradients of one step: the gradient-free first pass, then the microbatches one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Num, Shaped

from moe_train import config
from moe_train.machine.mesh import AXES, axis_size, batch_axes, platform
from moe_train.model.moe.router import RouterStats, balance_loss, merge_microbatches
from moe_train.model.parameters import Parameters
from moe_train.model.sharding.fsdp import mesh_axes
from moe_train.model.sharding.specs import spec_of, sum_over_replicas
from moe_train.train.objectives.objective import ModelWeights, Terms, divide, objective_inputs
from moe_train.train.step_definition import StepDefinition


class StepGradients(NamedTuple):
    """Result of `step_gradients`."""

    loss: Float[Array, ""]
    """total(sum) / total(weight) plus the routers' losses, which are summed over layers and averaged over tokens."""
    weight: Num[Array, ""]
    """The total weight of the step, total(weight)."""
    terms: Terms
    """Terms summed over microbatches; means in the routers' statistics are averaged."""
    gradients: Parameters
    """Gradients by path, in the parameters' dtypes."""


class _Totals(NamedTuple):
    """Results for the whole step that are computed before its first gradient."""

    weight: Num[Array, ""]
    first_pass: Any
    """Result of the objective's first pass, summed over microbatches; None if it has none."""
    tokens: Int[Array, ""] | None
    """Number of positions that are no padding; None if the batch type does not state padding."""
    load_LE: Float[Array, "L E"] | None
    """Share of the assignments of each layer that each expert gets; None if the balance loss is that of each microbatch."""


def step_gradients(
    definition: StepDefinition, trainable: Parameters, fixed: ModelWeights, batch: Any, key: Key[Array, ""] | None
) -> StepGradients:
    """Compute the loss of a step and its gradients with respect to `trainable`, accumulated in float32 over microbatches.

    With several replicas (the axis `data`, over the slow network) and several microbatches, each replica sums the gradients of
    its own rows, and the sums are all-reduced once, in `gradient_dtype`. The gradients of a single microbatch are reduced in the
    dtype of the computation: bfloat16 for matrices, float32 for norms and routers, which are small and computed in float32.

    Args:
        definition: what the step does.
        trainable: weights to differentiate with respect to.
        fixed: all other weights of the model; `fixed.learned` holds its buffers.
        batch: global (B, T) arrays.
        key: PRNG key for the dropout of the adapters; None for no dropout.
    """
    first_pass = _first_pass(definition, trainable, fixed, batch, key)
    weight = definition.objective.weight(batch, first_pass)
    load_LE = None
    if definition.router_loss.needs_routing_pass(definition.microbatches):
        load_LE = _load_of_step(definition, trainable, fixed, first_pass, batch, key)
    totals = _Totals(weight, first_pass, count_tokens(batch), load_LE)
    # A single microbatch needs no sums, so its gradients keep the parameters' dtypes throughout.
    if definition.microbatches == 1:
        (loss, terms), gradients = _share_and_gradients(definition, trainable, fixed, totals, batch, key)
        return StepGradients(loss, totals.weight, terms, gradients)
    if axis_size("data") == 1:
        return _accumulate(definition, trainable, fixed, totals, batch, key)
    return _accumulate_on_replicas(definition, trainable, fixed, totals, batch, key)


def _accumulate_on_replicas(
    definition: StepDefinition,
    trainable: Parameters,
    fixed: ModelWeights,
    totals: _Totals,
    batch: Any,
    key: Key[Array, ""] | None,
) -> StepGradients:
    """Accumulate the gradients of each replica's rows, in a `shard_map` over `data`, and all-reduce the sums.

    JAX 0.10 takes arguments and results of a `shard_map` over some of the explicit axes as replicated over the others:
    each chip would gather the whole model, and whole gradients in float32. Automatic axes leave their sharding open, so the
    others are automatic at its border and explicit again inside.
    """
    arguments = (trainable, fixed, totals, batch, key)
    other_axes = tuple(axis for axis in AXES if axis != "data")
    inside_specs = jax.tree.map(lambda x: _without_data(spec_of(x)), arguments)
    accumulate = partial(_accumulate, definition, gradient_dtype=definition.gradient_dtype)
    inside = jax.sharding.explicit_axes(accumulate, axes=other_axes, in_sharding=inside_specs)
    in_specs = (P(), P(), P(), P("data"), P())
    # The check is off: with it, JAX 0.10 to 0.12 give the values that a shard_map in here saves for its backward pass a spec
    # that names `data` twice.
    on_replicas = jax.shard_map(inside, in_specs=in_specs, out_specs=P(), axis_names={"data"}, check_vma=False)
    out_specs: list[Any] = [P(), P(), P(), jax.tree.map(spec_of, trainable)]
    return jax.sharding.auto_axes(on_replicas, axes=other_axes, out_sharding=StepGradients(*out_specs))(*arguments)


def _without_data(spec: P) -> P:
    """Return the spec that an array has on one replica: `data`, which splits the first dim of a batch, is left out."""
    entries = (tuple(axis for axis in mesh_axes(entry) if axis != "data") or None for entry in spec)
    return P(*(entry[0] if entry is not None and len(entry) == 1 else entry for entry in entries))


def _accumulate(
    definition: StepDefinition,
    trainable: Parameters,
    fixed: ModelWeights,
    totals: _Totals,
    batch: Any,
    key: Key[Array, ""] | None,
    gradient_dtype: jnp.dtype | None = None,
) -> StepGradients:
    """Accumulate the gradients of all rows or, in a `shard_map` over `data`, of this replica's rows, all-reduced at the end."""

    def share_of(microbatch: Any) -> tuple[Any, RouterStats | None]:
        (share, terms), gradients = _share_and_gradients(definition, trainable, fixed, totals, *microbatch)
        # Router statistics are stacked and not summed, since `merge_microbatches` averages some of them.
        return (share, terms._replace(routers=None), gradients), terms.routers

    microbatches = split_batch(batch, key, definition.microbatches)
    (loss, terms, gradients), routers = _sum_merge_microbatches(share_of, microbatches)
    if routers is not None:
        terms = terms._replace(routers=merge_microbatches(routers, totals.load_LE is not None))
    # The dtype of the sum decides how many bytes cross the slow network between replicas.
    gradients = jax.tree.map(lambda g, x: g.astype(gradient_dtype or x.dtype), gradients, trainable)
    gradients = sum_over_replicas(gradients)
    gradients = jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, trainable)
    return StepGradients(loss, totals.weight, terms, gradients)


def _sum_merge_microbatches(
    function: Callable[[Any], tuple[Any, Any]], microbatches: Any, unrolled: bool = False
) -> tuple[Any, Any]:
    """Sum the first results of `function` over microbatches, and stack its second results.

    Floats are summed in float32.
    """

    def add(total: Any, microbatch: Any) -> tuple[Any, Any]:
        summed, stacked = function(microbatch)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, summed), stacked

    def zero(shape: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
        is_float = jnp.issubdtype(shape.dtype, jnp.floating)
        dtype = jnp.promote_types(shape.dtype, jnp.float32) if is_float else shape.dtype
        return jnp.zeros(shape.shape, dtype, out_sharding=shape.sharding)

    # The zeros to start from need the dtypes and shardings of the results, which `eval_shape` gives without computing.
    shapes, _ = jax.eval_shape(lambda xs: function(jax.tree.map(lambda x: x[0], xs)), microbatches)
    return jax.lax.scan(add, jax.tree.map(zero, shapes), microbatches, unroll=unrolled)


def _first_pass(
    definition: StepDefinition, trainable: Parameters, fixed: ModelWeights, batch: Any, key: Key[Array, ""] | None
) -> Any:
    """Run the objective's gradient-free pass over all microbatches, in global view; None if it has none."""
    first_pass = definition.objective.first_pass
    if first_pass is None:
        return None
    weights = fixed._replace(learned=trainable | fixed.learned)

    def sums_of(microbatch: Any) -> tuple[Any, None]:
        inputs = objective_inputs(definition.objective, definition.structure, weights, *microbatch)
        return jax.tree.map(jnp.asarray, first_pass(inputs)), None

    if definition.microbatches == 1:
        return sums_of((batch, key))[0]
    return _sum_without_gradients(sums_of, definition, batch, key)


def _load_of_step(
    definition: StepDefinition,
    trainable: Parameters,
    fixed: ModelWeights,
    first_pass: Any,
    batch: Any,
    key: Key[Array, ""] | None,
) -> Float[Array, "L E"]:
    """Run a forward pass over all microbatches, in global view, that only counts the assignments of each expert."""
    weights = fixed._replace(learned=jax.lax.stop_gradient(trainable) | fixed.learned)

    def sums_of(microbatch: Any) -> tuple[Int[Array, "L E"], None]:
        inputs = objective_inputs(definition.objective, definition.structure, weights, *microbatch)
        # Only the statistics are used, so XLA leaves out the head, the loss and the last layer's experts.
        routers = definition.objective.loss(inputs, first_pass).routers
        if routers is None:
            raise ValueError(_NO_STATISTICS.format(definition.router_loss.model_dump(exclude_none=True)))
        return routers.chosen_E, None

    chosen_LE = _sum_without_gradients(sums_of, definition, batch, key)
    return chosen_LE / jnp.maximum(jnp.sum(chosen_LE, axis=-1, keepdims=True), 1)


def _sum_without_gradients(
    function: Callable[[Any], tuple[Any, None]], definition: StepDefinition, batch: Any, key: Key[Array, ""] | None
) -> Any:
    """Sum the results of `function` over microbatches, in global view and before the first gradient."""
    # XLA:CPU may run the collectives of this loop at the same time as others, and all devices may then wait for each other.
    unrolled = platform() == "cpu"
    return _sum_merge_microbatches(function, split_batch(batch, key, definition.microbatches), unrolled)[0]


def _share_and_gradients(
    definition: StepDefinition, trainable: Parameters, fixed: ModelWeights, totals: _Totals, batch: Any, key: Key[Array, ""] | None
) -> tuple[tuple[Float[Array, ""], Terms], Parameters]:
    """Compute ((a microbatch's share of the step's loss, its terms), gradients); the shares of all microbatches add up."""
    objective = definition.objective
    coefs = definition.router_loss

    def share(trainable: Parameters) -> tuple[Float[Array, ""], Terms]:
        weights = fixed._replace(learned=trainable | fixed.learned)
        inputs = objective_inputs(objective, definition.structure, weights, batch, key)
        terms = objective.loss(inputs, totals.first_pass)
        # Metrics of a custom objective may be Python numbers, but sums over microbatches need arrays with shape and dtype.
        total, metrics = sum_over_replicas((terms.sum, jax.tree.map(jnp.asarray, dict(terms.metrics))))
        loss = divide(total, totals.weight)
        if terms.routers is not None:
            loss += _share_of_tokens(definition, totals, batch) * _router_loss(terms.routers, coefs, totals.load_LE)
        # `fixed.learned` holds router biases, which move by the statistics only.
        elif fixed.learned or any(coefs.model_dump(exclude={"balance_over"}).values()):
            raise ValueError(_NO_STATISTICS.format(coefs.model_dump(exclude_none=True)))
        routers = terms.routers
        if routers is not None:
            # Arrays of every token, which only the objective needs.
            routers = routers._replace(expert_ids=None)
        return loss, terms._replace(sum=total, metrics=metrics, routers=routers)

    return jax.value_and_grad(share, has_aux=True)(trainable)


_NO_STATISTICS = (
    "loss {} balances routers, but the objective returns no router statistics; return those of model(...) as its fourth value, or "
    "leave the coefficients out"
)


def _share_of_tokens(definition: StepDefinition, totals: _Totals, batch: Any) -> Float[Array, ""] | float:
    """Return the share of the step's tokens that a microbatch has, so that the shares' mean is the mean over all tokens."""
    if definition.microbatches == 1:
        return 1.0
    tokens = count_tokens(batch)
    if tokens is None or totals.tokens is None:
        return 1 / definition.microbatches
    return divide(sum_over_replicas(tokens), totals.tokens)


def count_tokens(batch: Any) -> Int[Array, ""] | None:
    """Count the positions of a batch that are no padding; None for a batch type without `segment_ids`."""
    segment_ids = getattr(batch, "segment_ids", None)
    return None if segment_ids is None else jnp.sum(segment_ids != 0, dtype=jnp.int32)


def _router_loss(routers: RouterStats, coefs: config.Loss, load_LE: Float[Array, "L E"] | None) -> Float[Array, ""]:
    """Return the routers' losses, with the loads of the whole step if they are known."""
    losses_L = routers.load_balance_loss
    if load_LE is not None:
        assert routers.mean_probability_E is not None
        losses_L = balance_loss(load_LE, routers.mean_probability_E)
    balance = (coefs.load_balance_loss_coef or 0.0) * jnp.sum(losses_L)
    z = (coefs.router_z_loss_coef or 0.0) * jnp.sum(routers.router_z_loss)
    return balance + z


def split_batch(batch: Any, key: Key[Array, ""] | None, microbatches: int) -> tuple[Any, Key[Array, " M"] | None]:
    """Split a batch into microbatches and their PRNG keys, stacked on dim 0.

    Sequence i of microbatch j is row i * microbatches + j: each device splits its own rows, whatever the mesh.
    """
    keys = None if key is None else jax.random.split(key, microbatches)
    return jax.tree.map(lambda x: _split_rows(x, microbatches), batch), keys


def _split_rows(x: Shaped[Array, "B T ..."], microbatches: int) -> Shaped[Array, "{microbatches} b T ..."]:
    spec = P(batch_axes(), None, "context")
    split = jax.lax.reshape(x, (x.shape[0] // microbatches, microbatches, *x.shape[1:]), out_sharding=spec)
    return jnp.moveaxis(split, 1, 0)
