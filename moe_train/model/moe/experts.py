"""The routed experts: each token's, weighted and summed, on whatever devices they are.

An assignment is a (token, expert) pair. `run_experts` has the global view; inside its `shard_map`, where lower-case letters
are this device's part of a dim, a transport brings tokens to their experts and back, and `_swiglu` is what an expert does.
Three transports with one contract: `all_gather` in `dispatch`, `all_to_all` in `exchange`, `ragged_all_to_all` in `ragged`;
`transport` chooses.
Nothing is dropped unless a capacity is set; `computed` counts what was done, so that nobody has to believe it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import axis_size, batch_axes, global_axes
from moe_train.model.moe.capacity import capacity, within_capacity
from moe_train.model.moe.grouped_matmul import choose_kernel, grouped_matmul
from moe_train.model.moe.transport import ragged_all_to_all
from moe_train.model.moe.transport.all_gather import all_gather
from moe_train.model.moe.transport.all_to_all import exchange
from moe_train.model.moe.transport.choose import AlongExpert, check_transport, choose_transport
from moe_train.model.quantize import Quantized, dequantize
from moe_train.model.sharding.collectives import gather
from moe_train.model.sharding.fsdp import vary_with_spec
from moe_train.model.sharding.specs import replicas, spec_of


class ExpertMatrix(NamedTuple):
    """One linear map of every expert: weight (E, in, out), and the adapter beside it where there is one."""

    weight: jax.Array | Quantized
    lora_a: jax.Array | None
    lora_b: jax.Array | None
    """Times the adapter's scale."""


class ExpertWeights(NamedTuple):
    """SwiGLU experts."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


class Dropout(NamedTuple):
    """Of the inputs of the experts' adapters."""

    key: jax.Array
    rates: tuple[float, ...]
    """Of gate, up and down."""


def run_experts(
    x_BTD: jax.Array,
    expert_ids_BTA: jax.Array,
    expert_weights_BTA: jax.Array,
    valid_BT: jax.Array,
    experts: ExpertWeights,
    kernel: str,
    dropout: Dropout | None = None,
    transport: str = "auto",
    capacity_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of each token's experts (B, T, D), and the number of assignments computed (int32).

    Tokens that are not `valid` (padding) go to no expert and come back as zeros. capacity_factor: see `capacity`.
    """
    tokens = P(batch_axes(), "context")
    specs = jax.tree.map(spec_of, experts)
    key = numbers_BT = None
    if dropout is not None:
        row, column = (jax.lax.broadcasted_iota(jnp.uint32, x_BTD.shape[:2], dim, out_sharding=tokens) for dim in (0, 1))
        first = jnp.asarray(replicas()[1], jnp.uint32) * x_BTD.shape[0]
        key, numbers_BT = dropout.key, (first + row) * x_BTD.shape[1] + column

    axes = global_axes()

    def whole(experts: ExpertWeights) -> ExpertWeights:
        return jax.tree.map(lambda w, spec: _whole(w, spec, x_BTD.dtype, axes), experts, specs, is_leaf=_is_quantized)

    def run(x_RD: jax.Array, group_sizes_e: jax.Array, experts: ExpertWeights, key: Any, numbers_R: Any) -> jax.Array:
        drops: list[Drop | None] = [None] * 3
        if dropout is not None:
            drops = [partial(_dropped, jax.random.fold_in(key, i), rate, numbers_R) for i, rate in enumerate(dropout.rates)]
        return _swiglu(x_RD, experts, group_sizes_e, kernel, drops)

    def local(x_btD, ids_btA, weights_btA, valid_bt, experts, key, numbers_bt):
        b, t, D = x_btD.shape
        x_mD, ids_mA, weights_mA = (x.reshape(b * t, x.shape[2]) for x in (x_btD, ids_btA, weights_btA))
        E = experts.gate.weight.shape[0] * axis_size("expert")
        ids_mA = jnp.where(valid_bt.reshape(-1, 1), ids_mA, E)  # E: goes nowhere
        most = None
        if capacity_factor is not None:
            ids_mA = within_capacity(ids_mA.reshape(ids_btA.shape), E, capacity_factor).reshape(ids_mA.shape)
            most = b * experts.gate.weight.shape[0] * capacity(capacity_factor, t * axis_size("context"), ids_mA.shape[1], E)
        numbers_mA = None
        if numbers_bt is not None:
            A = ids_mA.shape[1]
            numbers_mA = numbers_bt.reshape(-1, 1) * A + jnp.arange(A, dtype=jnp.uint32)
        # on each device of `tensor` a part of F: gradients of x and of the weights are summed over it
        x_mD, weights_mA = (jax.lax.pcast(x, "tensor", to="varying") for x in (x_mD, jnp.where(ids_mA < E, weights_mA, 0)))
        check_transport(transport)
        along = AlongExpert(b * t, D, ids_mA.shape[1], axis_size("expert"), x_btD.dtype.itemsize, most)
        name = choose_transport(transport, along)
        move = {"all_gather": all_gather, "all_to_all": exchange, "ragged_all_to_all": ragged_all_to_all.exchange}[name]
        y_mD, computed = move(x_mD, ids_mA, weights_mA, experts, (key, numbers_mA), run, whole, most)
        return y_mD.reshape(b, t, D), jax.lax.psum(computed, (*tokens[0], "context"))

    # a Pallas call does not say along which axes its result varies
    everywhere = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, tokens, specs, P(), tokens),
        out_specs=(tokens, P()),
        check_vma=choose_kernel(kernel) != "megablox",
    )
    experts = _cast(experts, x_BTD.dtype, jnp.max(expert_ids_BTA) >= 0)
    return everywhere(x_BTD, expert_ids_BTA, expert_weights_BTA, valid_BT, experts, key, numbers_BT)


def _cast(experts: ExpertWeights, dtype: jnp.dtype, true: jax.Array) -> ExpertWeights:
    """Weights in the compute dtype, in which their gradients are then summed over all devices: global view, before any of
    these sums.

    true: a truth that only this layer's routing can tell. A cast that depends on nothing but the weight is taken out of
    the loop over layers by XLA, which then holds a second copy of the experts of all layers; a barrier does not stop it.
    """

    def cast(w: jax.Array | Quantized) -> jax.Array | Quantized:
        return w if isinstance(w, Quantized) or w.dtype == dtype else (w * true.astype(w.dtype)).astype(dtype)

    return jax.tree.map(cast, experts, is_leaf=_is_quantized)


def _is_quantized(w: object) -> bool:
    return isinstance(w, Quantized)


def _whole(w: jax.Array | Quantized, spec: P | Quantized, dtype: jnp.dtype, axes: tuple[str, ...]) -> jax.Array:
    """This device's experts in the compute dtype, gathered over `fsdp`; the gradient is scattered back."""
    if isinstance(w, Quantized):
        assert isinstance(spec, Quantized)
        return dequantize(Quantized(*(_gathered(part, s, axes) for part, s in zip(w, spec, strict=True))), dtype)
    assert not isinstance(spec, Quantized)
    return _gathered(w, spec, axes)


def _gathered(w: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
    w = vary_with_spec(w, spec, axes)
    for dim, axis in enumerate(spec):
        if axis == "fsdp":
            w = gather(w, "fsdp", dim)
    return w


Drop = Callable[[jax.Array, jax.Array | int], jax.Array]
"""x (R, n) and the number of its first column in the whole dim -> x with some entries zero."""


def _swiglu(
    x_RD: jax.Array, experts: ExpertWeights, group_sizes_e: jax.Array, kernel: str, drops: Sequence[Drop | None]
) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of each row's expert; partial over `tensor` (F is split)."""

    def matmul(x: jax.Array, m: ExpertMatrix, drop: Drop | None, first: jax.Array | int = 0) -> jax.Array:
        assert not isinstance(m.weight, Quantized)
        y = grouped_matmul(x, m.weight, group_sizes_e, kernel)
        if m.lora_a is not None and m.lora_b is not None:
            low = grouped_matmul(x if drop is None else drop(x, first), m.lora_a, group_sizes_e, kernel)
            y += grouped_matmul(low, m.lora_b, group_sizes_e, kernel)
        return checkpoint_name(y, "experts")

    h_Rf = jax.nn.silu(matmul(x_RD, experts.gate, drops[0])) * matmul(x_RD, experts.up, drops[1])
    return matmul(h_Rf, experts.down, drops[2], jax.lax.axis_index("tensor") * h_Rf.shape[1])


def _dropped(key: jax.Array, rate: float, number_R: jax.Array, x_Rn: jax.Array, first: jax.Array | int) -> jax.Array:
    """x with a share `rate` of its entries zero, and the others 1 / (1 - rate) as large.

    Which ones is a function of the key, the assignment's number and the column's: the same on every mesh.
    """
    if rate == 0:
        return x_Rn
    columns_n = jnp.asarray(first, jnp.uint32) + jnp.arange(x_Rn.shape[1], dtype=jnp.uint32)
    counts = [jnp.broadcast_to(x, x_Rn.shape).reshape(-1) for x in (number_R[:, None], columns_n)]
    bits = threefry_2x32(jax.random.key_data(key), jnp.concatenate(counts))[: x_Rn.size]
    return jnp.where(bits.reshape(x_Rn.shape) >= np.uint32(rate * 2**32), x_Rn / (1 - rate), 0)
