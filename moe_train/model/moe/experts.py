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
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from moe_train.machine.mesh import axis_size, batch_axes, global_axes
from moe_train.model.moe.capacity import capacity, within_capacity
from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights, InStack, SeparateExperts
from moe_train.model.moe.grouped_matmul import choose_grouped_matmul_kernel, grouped_matmul
from moe_train.model.moe.separate_experts import apply_separate_experts
from moe_train.model.moe.transport.choose import check_transport, choose_transport
from moe_train.model.moe.transport.transport import (
    ApplyExperts,
    Assignments,
    DropoutCounters,
    ExchangeSizes,
    LocalExperts,
    TransportName,
)
from moe_train.model.quantize import Quantized, dequantize
from moe_train.model.sharding.collectives import gather_axis
from moe_train.model.sharding.fsdp import vary_with_spec
from moe_train.model.sharding.local_view import in_local_view, index_along, sum_along, vary
from moe_train.model.sharding.specs import replicas, spec_of


class Routing(NamedTuple):
    """The experts and weights that the router chose for each token."""

    expert_ids_BTA: Int[Array, "B T A"]
    weights_BTA: Float[Array, "B T A"]
    valid_BT: Bool[Array, "B T"]
    """False for padding, which is sent to no expert."""


class Dropout(NamedTuple):
    """Dropout applied to the inputs of the expert adapters."""

    key: Key[Array, ""]
    rates: tuple[float, ...]
    """Dropout rates of gate, up and down."""


@dataclass(frozen=True)
class ExpertSettings:
    """Settings for running the experts; only `capacity_factor` changes the result."""

    kernel: str
    """Value of `compute.grouped_matmul`."""
    transport: TransportName | Literal["auto"] = "auto"
    """Value of `compute.transport`."""
    capacity_factor: float | None = None
    """Capacity factor as in `capacity`; None drops nothing."""


def run_experts(
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    experts: ExpertWeights | SeparateExperts,
    settings: ExpertSettings,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Compute the weighted sum of each token's expert outputs. Global view.

    Args:
        x_BTD: inputs of the experts.
        routing: expert ids and weights (B, T, A), and which tokens are valid.
        experts: weights of all experts; separate ones on a mesh that does not split them (`separate_layers`).
        settings: kernel, transport and capacity factor.
        dropout: dropout on the inputs of the adapters; None for no dropout.

    Returns:
        The weighted sums (B, T, D), zeros for padding, and the number of assignments computed (int32). The number is counted
        where the experts are applied, so callers can verify that no assignment was lost.
    """
    tokens = P(batch_axes(), "context")
    axes = global_axes()
    specs = jax.tree.map(spec_of, experts)
    counters = counter_specs = rates = None
    if dropout is not None:
        counters = _token_counters(x_BTD, tokens, dropout.key)
        counter_specs = DropoutCounters(P(), tokens)  # type: ignore[arg-type]  # a spec in the place of each array
        rates = dropout.rates

    unshard = partial(_unshard_experts, specs=specs, dtype=x_BTD.dtype, axes=axes)
    apply: ApplyExperts = partial(_apply_experts, kernel=settings.kernel, dropout_rates=rates)
    if isinstance(experts, SeparateExperts):
        apply = apply_separate_experts

    def local(
        x_btD: Float[Array, "b t D"],
        routing: Routing,
        experts: ExpertWeights | SeparateExperts,
        counters: DropoutCounters | None,
    ) -> tuple[Float[Array, "b t D"], Int[Array, ""]]:
        b, t, D = x_btD.shape
        e = experts.num_experts
        assignments, peer_capacity = _local_assignments(x_btD, routing, e, settings.capacity_factor, counters)
        check_transport(settings.transport)
        A = assignments.expert_ids_mA.shape[1]
        sizes = ExchangeSizes(b * t, D, A, axis_size("expert"), x_btD.dtype.itemsize, peer_capacity)
        transport = choose_transport(settings.transport, sizes)
        y_mD, computed = transport.run_experts(assignments, LocalExperts(experts, unshard, apply, e), sizes)
        # Not summed over `tensor`, whose devices compute the same assignments, each for its part of F.
        return y_mD.reshape(b, t, D), sum_along(computed, (*tokens[0], "context"))

    run = in_local_view(
        local,
        in_specs=(tokens, tokens, specs, counter_specs),
        out_specs=(tokens, P()),
        # A Pallas call does not declare along which axes its result varies.
        check_vma=choose_grouped_matmul_kernel(settings.kernel) != "megablox",
    )
    return run(x_BTD, routing, experts, counters)


def _token_counters(x_BTD: Float[Array, "B T D"], tokens: P, key: Key[Array, ""]) -> DropoutCounters:
    """Return one counter per token (B, T), counted over the tokens of all replicas, so that dropout is the same on every mesh."""
    B, T, _ = x_BTD.shape
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, (B, T), dim, out_sharding=tokens) for dim in (0, 1))
    first_row = jnp.asarray(replicas()[1], jnp.uint32) * B
    return DropoutCounters(key, (first_row + row) * T + column)


def _local_assignments(
    x_btD: Float[Array, "b t D"],
    routing: Routing,
    experts_per_device: int,
    capacity_factor: float | None,
    counters: DropoutCounters | None,
) -> tuple[Assignments, int | None]:
    """Return the assignments of this device's tokens, and the largest number of them for one peer.

    The number is None without a capacity factor. Padding, and what exceeds the capacity, is sent nowhere. Local view.
    """
    b, t, A = routing.expert_ids_BTA.shape
    E = experts_per_device * axis_size("expert")
    x_mD, ids_mA, weights_mA = (x.reshape(b * t, x.shape[2]) for x in (x_btD, *routing[:2]))
    # Expert id E means that the assignment is sent nowhere.
    ids_mA = jnp.where(routing.valid_BT.reshape(-1, 1), ids_mA, E)
    peer_capacity = None
    if capacity_factor is not None:
        ids_mA = within_capacity(ids_mA.reshape(b, t, A), E, capacity_factor).reshape(ids_mA.shape)
        # Each of this device's b rows may fill all experts of a peer.
        peer_capacity = b * experts_per_device * capacity(capacity_factor, t * axis_size("context"), A, E)
    if counters is not None:
        token_m1 = counters.counters.reshape(-1, 1)
        counters = DropoutCounters(counters.key, token_m1 * A + jnp.arange(A, dtype=jnp.uint32))
    weights_mA = jnp.where(ids_mA < E, weights_mA, 0)
    # F is split over `tensor`: the cast makes the gradients of x and of the router weights a sum over it.
    x_mD, weights_mA = vary((x_mD, weights_mA), "tensor")
    return Assignments(x_mD, ids_mA, weights_mA, counters), peer_capacity


def _apply_experts(
    x_RD: Float[Array, "R D"],
    group_sizes_e: Int[Array, " e"],
    experts: ExpertWeights,
    counters_R: DropoutCounters | None,
    kernel: str,
    dropout_rates: tuple[float, ...] | None,
) -> Float[Array, "R D"]:
    """Apply unsharded experts to rows in the order of their experts. See `transport.ApplyExperts`."""
    drops: list[Drop | None] = [None] * 3
    if counters_R is not None and dropout_rates is not None:
        keys = [jax.random.fold_in(counters_R.key, i) for i in range(3)]
        drops = [partial(_drop, *pair, counters_R.counters) for pair in zip(keys, dropout_rates, strict=True)]
    return _swiglu(x_RD, experts, group_sizes_e, kernel, drops)


def cast_experts(experts: ExpertWeights, dtype: jnp.dtype, hidden_BTD: Float[Array, "B T D"]) -> ExpertWeights:
    """Cast the weights to the compute dtype, in which their gradients are then summed over all devices.

    Global view, applied before any of these sums.

    Args:
        experts: weights of all experts; quantized ones are left as they are.
        dtype: compute dtype.
        hidden_BTD: hidden states that enter the layer. They only keep the cast inside the loop over layers: XLA moves a cast that
            depends on nothing but weights out of the loop, and then holds a second copy of the experts of all layers; a barrier
            does not prevent it. What the router chose would do too, but is known after attention, which the gathers of the cast
            weights should run beside.
    """
    # True for any hidden states, NaN included, which XLA does not see.
    true = jnp.sign(jnp.max(jax.lax.stop_gradient(hidden_BTD))).astype(jnp.int32) != 7

    def cast(w: Float[Array, "*dims"] | Quantized | InStack) -> Float[Array, "*dims"] | Quantized | InStack:
        if isinstance(w, Quantized) or w.dtype == dtype:
            return w
        assert not isinstance(w, InStack)  # read where it is, and so in its own dtype
        return (w * true.astype(w.dtype)).astype(dtype)

    return jax.tree.map(cast, experts, is_leaf=_is_weight)


def _is_weight(w: object) -> bool:
    """Return whether a node of `ExpertWeights` is one weight, though of several arrays."""
    return isinstance(w, Quantized | InStack)


def _unshard_experts(
    experts: ExpertWeights | SeparateExperts, specs: ExpertWeights | SeparateExperts, dtype: jnp.dtype, axes: tuple[str, ...]
) -> ExpertWeights | SeparateExperts:
    """Return this device's experts as `_unshard` does; separate ones are whole, and are cast where they are applied."""
    if isinstance(experts, SeparateExperts):
        return experts
    return jax.tree.map(lambda w, spec: _unshard(w, spec, dtype, axes), experts, specs, is_leaf=_is_weight)


def _unshard(
    w: Float[Array, "..."] | Quantized | InStack, spec: P | Quantized | InStack, dtype: jnp.dtype, axes: tuple[str, ...]
) -> Float[Array, "..."] | InStack:
    """Return this device's experts in the compute dtype, gathered over `fsdp`; the gradient is scattered back."""
    if isinstance(w, InStack):
        return w  # on one device, which has all experts
    if isinstance(w, Quantized):
        assert isinstance(spec, Quantized)
        codes = _gather_fsdp(w.codes, spec.codes, axes)
        scales = _gather_fsdp(w.scales, spec.scales, axes)
        return dequantize(Quantized(codes, scales), dtype)
    assert isinstance(spec, P)
    return _gather_fsdp(w, spec, axes)


def _gather_fsdp(w: Shaped[Array, "..."], spec: P, axes: tuple[str, ...]) -> Shaped[Array, "..."]:
    w = vary_with_spec(w, spec, axes)
    for dim, axis in enumerate(spec):
        if axis == "fsdp":
            w = gather_axis(w, "fsdp", dim)
    return w


Drop = Callable[[Float[Array, "R n"], Int[Array, ""] | int], Float[Array, "R n"]]
"""Dropout of x (R, n), given the index of its first column in the dim that `tensor` may split."""


def _swiglu(
    x_RD: Float[Array, "R D"],
    experts: ExpertWeights,
    group_sizes_e: Int[Array, " e"],
    kernel: str,
    drops: Sequence[Drop | None],
) -> Float[Array, "R D"]:
    """Compute down(silu(gate(x)) * up(x)) with the expert of each row.

    The result is a partial sum over `tensor`, which splits F.
    """

    def matmul(x: Float[Array, "R I"], m: ExpertMatrix, drop: Drop | None, first: Int[Array, ""] | int = 0) -> Float[Array, "R O"]:
        assert not isinstance(m.weight, Quantized)
        y = grouped_matmul(x, m.weight, group_sizes_e, kernel)
        if m.lora_a is not None and m.lora_b is not None:
            dropped = x if drop is None else drop(x, first)
            low_rank = grouped_matmul(dropped, m.lora_a, group_sizes_e, kernel)
            y = grouped_matmul(low_rank, m.lora_b, group_sizes_e, kernel, add_to_RF=y)
        return checkpoint_name(y, "experts")

    # Each of the three inputs is dropped independently; only the input of `down` is split over `tensor`, along F.
    h_Rf = jax.nn.silu(matmul(x_RD, experts.gate, drops[0])) * matmul(x_RD, experts.up, drops[1])
    return matmul(h_Rf, experts.down, drops[2], index_along("tensor") * h_Rf.shape[1])


def _drop(
    key: Key[Array, ""],
    rate: float,
    counter_R: UInt32[Array, " R"],
    x_Rn: Float[Array, "R n"],
    first: Int[Array, ""] | int,
) -> Float[Array, "R n"]:
    """Set a fraction `rate` of the entries of x to zero, and scale the others by 1 / (1 - rate).

    Which entries are dropped depends on the key, the row's counter and the column index only, so it is the same on every mesh.
    """
    if rate == 0:
        return x_Rn
    columns_n = jnp.asarray(first, jnp.uint32) + jnp.arange(x_Rn.shape[1], dtype=jnp.uint32)
    counts = [jnp.broadcast_to(x, x_Rn.shape).reshape(-1) for x in (counter_R[:, None], columns_n)]
    # threefry is counter-based: the bits of an entry depend on its row's counter and its column, not on the array's shape.
    # It pairs the first half of its input (counters) with the second half (columns); the first of a pair's two words is used.
    bits = threefry_2x32(jax.random.key_data(key), jnp.concatenate(counts))[: x_Rn.size]
    return jnp.where(bits.reshape(x_Rn.shape) >= np.uint32(rate * 2**32), x_Rn / (1 - rate), 0)
