"""Optimizers and learning-rate schedules, put together from Optax.

Every optimizer is one chain: clip the gradient's global norm, turn it into a direction, add decoupled weight decay,
multiply by the learning rate. What decays, and what is a matrix to Muon, is decided by a weight's path alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.mesh import axis_size
from moe_train.model.fsdp import spec_of
from moe_train.model.transformer import Parameters


def make_schedule(schedule: config.Schedule, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of step i = 0 … total_steps - 1: warm-up peak * (i + 1) / warmup_steps, then the schedule's fall,
    which ends at its final fraction at the last step.

    Raises ValueError where warm-up and decay are longer than the run.
    """
    first = max(schedule.warmup_steps - 1, 0)  # the first step at the peak
    fall = total_steps - 1 - first
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
            after = optax.cosine_decay_schedule(peak, max(fall, 1), schedule.final_fraction)
        case config.LinearSchedule():
            after = optax.linear_schedule(peak, peak * schedule.final_fraction, max(fall, 1))
        case config.WsdSchedule():
            after = optax.linear_schedule(peak, peak * schedule.final_fraction, decay, transition_begin=fall - decay)
    if not first:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / schedule.warmup_steps, peak, first), after], [first])


def make_optimizer(optimizer: config.Optimizer, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a config section, over flat dicts {path: array}."""
    rate = partial(make_schedule, optimizer.schedule, total_steps=total_steps)
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=partial(decay_mask, no_decay=optimizer.no_decay))
    clip = optax.identity() if optimizer.max_grad_norm is None else optax.clip_by_global_norm(optimizer.max_grad_norm)

    def with_rate(direction: optax.GradientTransformation, peak: float) -> optax.GradientTransformation:
        return optax.chain(direction, decay, optax.scale_by_learning_rate(rate(peak=peak)))

    match optimizer:
        case config.AdamW(b1=b1, b2=b2, eps=eps):
            update = with_rate(optax.scale_by_adam(b1, b2, eps), optimizer.learning_rate)
        case config.Lion(b1=b1, b2=b2):
            update = with_rate(optax.scale_by_lion(b1, b2), optimizer.learning_rate)
        case config.Adafactor():
            # without momentum, as in the paper; its root mean squares are those of a whole stack of layers
            factored = optax.scale_by_factored_rms(
                decay_rate=optimizer.decay_rate, min_dim_size_to_factor=optimizer.min_dim_size_to_factor
            )
            direction = optax.chain(factored, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
            update = with_rate(direction, optimizer.learning_rate)
        case config.Muon(b1=b1, b2=b2, eps=eps):
            momentum = optax.trace(optimizer.momentum, optimizer.nesterov)
            orthogonal = optax.stateless(lambda updates, _: orthogonalise(updates, optimizer.ns_steps))
            parts = {
                "matrix": with_rate(optax.chain(momentum, orthogonal), optimizer.learning_rate),
                "other": with_rate(optax.scale_by_adam(b1, b2, eps), optimizer.adamw_learning_rate),
            }
            update = optax.partition(parts, lambda params: {p: "matrix" if matrix_dims(p) else "other" for p in params})
    return optax.chain(clip, update)


def decay_mask(params: Mapping[str, Any], no_decay: tuple[str, ...]) -> dict[str, bool]:
    """{path: whether weight decay applies}; `no_decay` as in the config."""
    return {path: _kind(path) not in no_decay for path in params}


def _kind(path: str) -> str:
    if path.endswith(".scale"):
        return "norms"
    if path.endswith(".bias"):
        return "biases"
    if ".router." in path:
        return "router"
    if path.startswith(("embed.", "head")):
        return "embeddings"
    return "matrices"


# --- Muon ----------------------------------------------------------------------------------------------------------

_MATRICES = {
    # module: the dims of its weight, its lora_a and its lora_b, from the last: (into the sum, out of it)
    "q_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "k_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "v_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "o_proj": (((-3, -2), (-1,)), ((-3, -2), (-1,)), ((-2,), (-1,))),
    "gate_proj": (((-2,), (-1,)),) * 3,
    "up_proj": (((-2,), (-1,)),) * 3,
    "down_proj": (((-2,), (-1,)),) * 3,
}


def matrix_dims(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dims of a weight are the rows and columns of a matrix; the others count matrices (layers, experts).

    None for what is no matrix to Muon: embeddings, head, router and norms.
    """
    module, _, name = path.rpartition(".")
    dims = _MATRICES.get(module.rpartition(".")[2])
    return None if dims is None else optax.contrib.MuonDimensionNumbers(*dims[("weight", "lora_a", "lora_b").index(name)])


def orthogonalise(updates: Parameters, ns_steps: int) -> Parameters:
    """Each matrix U S V^T -> about U V^T, times sqrt(max(1, outputs / inputs)), by Newton-Schulz iterations
    (https://kellerjordan.github.io/posts/muon).

    Optax's iteration knows nothing of explicit shardings, so it runs in a local view: layers are dealt out to the
    devices that share a layer's matrices, each matrix is whole on one of them, and the result goes back.
    """
    return {path: x if isinstance(x, optax.MaskedNode) else _orthogonalise(path, x, ns_steps) for path, x in updates.items()}


def _orthogonalise(path: str, x: jax.Array, ns_steps: int) -> jax.Array:
    dims = matrix_dims(path)
    assert dims is not None
    inputs, outputs = (math.prod(x.shape[dim] for dim in axes) for axes in dims)
    specs = _to_whole_matrices(x.shape, spec_of(x), {dim % x.ndim for axes in dims for dim in axes})
    # with a momentum of 0 it is the iteration alone
    iteration = optax.contrib.scale_by_muon(ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dims)

    def local(x: jax.Array) -> jax.Array:
        return iteration.update(x, iteration.init(x))[0]

    for spec in specs[1:]:
        x = jax.sharding.reshard(x, spec)
    y = jax.shard_map(local, in_specs=specs[-1], out_specs=specs[-1])(x)
    for spec in reversed(specs[:-1]):
        y = jax.sharding.reshard(y, spec)
    return y * math.sqrt(max(1.0, outputs / inputs))


def _to_whole_matrices(shape: tuple[int, ...], spec: P, matrix: set[int]) -> list[P]:
    """Specs on the way from a weight's own to one with its matrix dims whole. The axes that split them split the
    layers (dim 0) instead, as far as they divide; one axis a step, since each such step is an all-to-all."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    specs = [spec]
    layers: tuple[str, ...] = ()
    assert entries[0] is None
    for dim in sorted(matrix):
        split = entries[dim] if isinstance(entries[dim], tuple) else (entries[dim],) if entries[dim] else ()
        for axis in reversed(split):  # the innermost first: what is left is a split by the others
            split = split[:-1]
            entries[dim] = split or None
            if shape[0] % math.prod(axis_size(a) for a in (*layers, axis)) == 0:
                layers = (*layers, axis)
            specs.append(P(layers or None, *entries[1:]))
    return specs
