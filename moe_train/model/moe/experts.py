"""The routed experts: the weighted sum of each token's expert outputs, wherever the experts are placed.

An assignment is a (token, expert) pair. `run_experts` has the global view. Inside its `shard_map`, where lower-case letters
are this device's part of a dim, a transport (`transport.transport`) brings tokens to their experts and the results back, and
`_swiglu` is what an expert computes. No assignment is dropped unless a capacity factor is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import axis_size, batch_axes, global_axes
from moe_train.model.moe.capacity import capacity, within_capacity
from moe_train.model.moe.grouped_matmul import choose_kernel, grouped_matmul
from moe_train.model.moe.transport.choose import check_transport, choose_transport
from moe_train.model.moe.transport.transport import Assignments, DropoutCounters, ExchangeSizes, LocalExperts, Name
from moe_train.model.quantize import Quantized, dequantize
from moe_train.model.sharding.collectives import gather
from moe_train.model.sharding.fsdp import vary_with_spec
from moe_train.model.sharding.specs import replicas, spec_of


class ExpertMatrix(NamedTuple):
    """One linear map of every expert: the weight (E, in, out) and the LoRA factors, None without an adapter."""

    weight: jax.Array | Quantized
    lora_a: jax.Array | None
    lora_b: jax.Array | None
    """LoRA factor B, already multiplied by the adapter's scale."""


class ExpertWeights(NamedTuple):
    """The three matrices of SwiGLU experts."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


class Routing(NamedTuple):
    """The experts and weights that the router chose for each token."""

    expert_ids_BTA: jax.Array
    weights_BTA: jax.Array
    valid_BT: jax.Array
    """False for padding, which is sent to no expert."""


class Dropout(NamedTuple):
    """Dropout applied to the inputs of the expert adapters."""

    key: jax.Array
    rates: tuple[float, ...]
    """Dropout rates of gate, up and down."""


@dataclass(frozen=True)
class ExpertSettings:
    """Settings for running the experts; only `capacity_factor` changes the result."""

    kernel: str
    """Value of `compute.grouped_matmul`."""
    transport: Name | Literal["auto"] = "auto"
    """Value of `compute.transport`."""
    capacity_factor: float | None = None
    """Capacity factor as in `capacity`; None drops nothing."""


def run_experts(
    x_BTD: jax.Array, routing: Routing, experts: ExpertWeights, settings: ExpertSettings, dropout: Dropout | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the weighted sum of each token's expert outputs. Global view.

    Args:
        x_BTD: inputs of the experts.
        routing: expert ids and weights (B, T, A), and which tokens are valid.
        experts: weights of all experts.
        settings: kernel, transport and capacity factor.
        dropout: dropout on the inputs of the adapters; None for no dropout.

    Returns:
        The weighted sums (B, T, D), zeros for padding, and the number of assignments computed (int32). The number is counted
        where the experts are applied, so callers can verify that no assignment was lost.
    """
    tokens = P(batch_axes(), "context")
    specs = jax.tree.map(spec_of, experts)
    key = counters_BT = None
    if dropout is not None:
        row, column = (jax.lax.broadcasted_iota(jnp.uint32, x_BTD.shape[:2], dim, out_sharding=tokens) for dim in (0, 1))
        # Counters number the tokens of all replicas, so that dropout is the same on every mesh.
        first = jnp.asarray(replicas()[1], jnp.uint32) * x_BTD.shape[0]
        key = dropout.key
        counters_BT = (first + row) * x_BTD.shape[1] + column

    axes = global_axes()

    def unshard(experts: ExpertWeights) -> ExpertWeights:
        return jax.tree.map(lambda w, spec: _unshard(w, spec, x_BTD.dtype, axes), experts, specs, is_leaf=_is_quantized)

    def apply(x_RD: jax.Array, group_sizes_e: jax.Array, experts: ExpertWeights, dropout_R: DropoutCounters | None) -> jax.Array:
        drops: list[Drop | None] = [None] * 3
        if dropout is not None and dropout_R is not None:
            keys = [jax.random.fold_in(dropout_R.key, i) for i in range(3)]
            drops = [partial(_drop, *pair, dropout_R.counters) for pair in zip(keys, dropout.rates, strict=True)]
        return _swiglu(x_RD, experts, group_sizes_e, settings.kernel, drops)

    def local(x_btD, ids_btA, weights_btA, valid_bt, experts, key, counters_bt):
        b, t, D = x_btD.shape
        A = ids_btA.shape[2]
        x_mD, ids_mA, weights_mA = (x.reshape(b * t, x.shape[2]) for x in (x_btD, ids_btA, weights_btA))
        e = experts.gate.weight.shape[0]
        E = e * axis_size("expert")
        # Expert id E means that the assignment is sent nowhere.
        ids_mA = jnp.where(valid_bt.reshape(-1, 1), ids_mA, E)
        peer_capacity = None
        if settings.capacity_factor is not None:
            ids_mA = within_capacity(ids_mA.reshape(ids_btA.shape), E, settings.capacity_factor).reshape(ids_mA.shape)
            peer_capacity = b * e * capacity(settings.capacity_factor, t * axis_size("context"), A, E)
        dropout_mA = None
        if counters_bt is not None:
            dropout_mA = DropoutCounters(key, counters_bt.reshape(-1, 1) * A + jnp.arange(A, dtype=jnp.uint32))
        # F is split over `tensor`: the cast makes the gradients of x and of the router weights a sum over it.
        x_mD, weights_mA = (jax.lax.pcast(x, "tensor", to="varying") for x in (x_mD, jnp.where(ids_mA < E, weights_mA, 0)))
        check_transport(settings.transport)
        sizes = ExchangeSizes(b * t, D, A, axis_size("expert"), x_btD.dtype.itemsize, peer_capacity)
        transport = choose_transport(settings.transport, sizes)
        assignments = Assignments(x_mD, ids_mA, weights_mA, dropout_mA)
        y_mD, computed = transport.run_experts(assignments, LocalExperts(experts, unshard, apply, e), sizes)
        return y_mD.reshape(b, t, D), jax.lax.psum(computed, (*tokens[0], "context"))

    run = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, tokens, specs, P(), tokens),
        out_specs=(tokens, P()),
        # A Pallas call does not declare along which axes its result varies.
        check_vma=choose_kernel(settings.kernel) != "megablox",
    )
    experts = _cast(experts, x_BTD.dtype, jnp.max(routing.expert_ids_BTA) >= 0)
    return run(x_BTD, *routing, experts, key, counters_BT)


def _cast(experts: ExpertWeights, dtype: jnp.dtype, true: jax.Array) -> ExpertWeights:
    """Cast the weights to the compute dtype, in which their gradients are then summed over all devices.

    Global view, applied before any of these sums.

    Args:
        experts: weights of all experts; quantized ones are left as they are.
        dtype: compute dtype.
        true: a true value that depends on this layer's routing. XLA moves a cast that depends on nothing but the weight out of
            the loop over layers and then holds a second copy of the experts of all layers; a barrier does not prevent it.
    """

    def cast(w: jax.Array | Quantized) -> jax.Array | Quantized:
        return w if isinstance(w, Quantized) or w.dtype == dtype else (w * true.astype(w.dtype)).astype(dtype)

    return jax.tree.map(cast, experts, is_leaf=_is_quantized)


def _is_quantized(w: object) -> bool:
    return isinstance(w, Quantized)


def _unshard(w: jax.Array | Quantized, spec: P | Quantized, dtype: jnp.dtype, axes: tuple[str, ...]) -> jax.Array:
    """Return this device's experts in the compute dtype, gathered over `fsdp`; the gradient is scattered back."""
    if isinstance(w, Quantized):
        assert isinstance(spec, Quantized)
        return dequantize(Quantized(*(_gather_fsdp(part, s, axes) for part, s in zip(w, spec, strict=True))), dtype)
    assert not isinstance(spec, Quantized)
    return _gather_fsdp(w, spec, axes)


def _gather_fsdp(w: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
    w = vary_with_spec(w, spec, axes)
    for dim, axis in enumerate(spec):
        if axis == "fsdp":
            w = gather(w, "fsdp", dim)
    return w


Drop = Callable[[jax.Array, jax.Array | int], jax.Array]
"""Dropout of x (R, n), given the index of its first column in the dim that `tensor` may split."""


def _swiglu(
    x_RD: jax.Array, experts: ExpertWeights, group_sizes_e: jax.Array, kernel: str, drops: Sequence[Drop | None]
) -> jax.Array:
    """Compute down(silu(gate(x)) * up(x)) with the expert of each row.

    The result is a partial sum over `tensor`, which splits F.
    """

    def matmul(x: jax.Array, m: ExpertMatrix, drop: Drop | None, first: jax.Array | int = 0) -> jax.Array:
        assert not isinstance(m.weight, Quantized)
        y = grouped_matmul(x, m.weight, group_sizes_e, kernel)
        if m.lora_a is not None and m.lora_b is not None:
            low_rank = grouped_matmul(x if drop is None else drop(x, first), m.lora_a, group_sizes_e, kernel)
            y += grouped_matmul(low_rank, m.lora_b, group_sizes_e, kernel)
        return checkpoint_name(y, "experts")

    h_Rf = jax.nn.silu(matmul(x_RD, experts.gate, drops[0])) * matmul(x_RD, experts.up, drops[1])
    return matmul(h_Rf, experts.down, drops[2], jax.lax.axis_index("tensor") * h_Rf.shape[1])


def _drop(key: jax.Array, rate: float, counter_R: jax.Array, x_Rn: jax.Array, first: jax.Array | int) -> jax.Array:
    """Set a fraction `rate` of the entries of x to zero, and scale the others by 1 / (1 - rate).

    Which entries are dropped depends on the key, the row's counter and the column index only, so it is the same on every mesh.
    """
    if rate == 0:
        return x_Rn
    columns_n = jnp.asarray(first, jnp.uint32) + jnp.arange(x_Rn.shape[1], dtype=jnp.uint32)
    counts = [jnp.broadcast_to(x, x_Rn.shape).reshape(-1) for x in (counter_R[:, None], columns_n)]
    bits = threefry_2x32(jax.random.key_data(key), jnp.concatenate(counts))[: x_Rn.size]
    return jnp.where(bits.reshape(x_Rn.shape) >= np.uint32(rate * 2**32), x_Rn / (1 - rate), 0)
