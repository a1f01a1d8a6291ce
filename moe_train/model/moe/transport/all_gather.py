"""Transport `all_gather`: every device gets all tokens of its `expert` axis and computes the assignments of its own experts.

Tokens, expert ids and weights are all-gathered. Outputs are partial sums over the experts; a reduce-scatter adds them up and
returns them to the devices of the tokens. Local view; R rows, one for each assignment of all X devices.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_train.model.moe.transport.transport import (
    Assignments,
    Combined,
    DropoutCounters,
    ExchangeSizes,
    LocalExperts,
    TransportName,
)
from moe_train.model.sharding.collectives import gather_axis, reduce_scatter_axis
from moe_train.model.sharding.local_view import index_along, sum_along

NAME: Final[TransportName] = "all_gather"
RECOMPUTES_EXPERTS: Final = False


def run_experts(assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes) -> Combined:
    """Gather all tokens, apply this device's experts to their rows, scatter the sums. See `transport.Transport`."""
    weights = experts.unshard(experts.weights)
    x_mD, ids_mA, weights_mA = (gather_axis(x, "expert", 0) for x in assignments[:3])
    e = experts.count
    A = ids_mA.shape[1]
    own_mA = ids_mA - index_along("expert") * e
    # Local expert id e means an expert of another device, or none.
    own_mA = jnp.where((own_mA >= 0) & (own_mA < e), own_mA, e)
    # A stable sort keeps tokens in order within an expert; assignments with id e come last and belong to no group.
    order_R = checkpoint_name(jnp.argsort(own_mA.reshape(-1), stable=True), "routing")
    inverse_mA = checkpoint_name(jnp.argsort(order_R).reshape(-1, A), "routing")
    group_sizes_e = jnp.sum(own_mA.reshape(-1, 1) == jnp.arange(e), axis=0, dtype=jnp.int32)
    dropout_R = None
    if assignments.dropout_mA is not None:
        key, counters_mA = assignments.dropout_mA
        dropout_R = DropoutCounters(key, gather_axis(counters_mA, "expert", 0).reshape(-1)[order_R])
    y_RD = experts.apply(dispatch_tokens(x_mD, order_R, inverse_mA), group_sizes_e, weights, dropout_R)
    y_mD = combine_rows(y_RD, jnp.where(own_mA < e, weights_mA, 0), order_R, inverse_mA).astype(x_mD.dtype)
    return Combined(reduce_scatter_axis(sum_along(y_mD, "tensor"), "expert", 0), jnp.sum(group_sizes_e))


def received(sizes: ExchangeSizes) -> dict[str, int]:
    """Return the bytes that a device receives. See `transport.Transport`.

    The tokens of the other devices, m rows each, are gathered in the forward pass and again for the recomputed layer, and so is
    the gradient of the outputs; outputs and the gradient of the tokens are reduce-scattered.
    """
    once = (sizes.devices - 1) * sizes.tokens * sizes.model_dim * sizes.itemsize
    return {"all-gather": 3 * once, "reduce-scatter": 2 * once}


def rows_at_once(sizes: ExchangeSizes) -> int:
    """Return the number of all assignments of all devices: any of them may go to this device's experts."""
    return sizes.devices * sizes.assignments


# Dispatch and combine are gathers, and so are their gradients: a scatter-add is serial on CPU and has no fixed order on GPU.


@jax.custom_vjp
def dispatch_tokens(x_mD: Float[Array, "m D"], order_R: Int[Array, " R"], inverse_mA: Int[Array, "m A"]) -> Float[Array, "R D"]:
    """Copy tokens to rows in the order of their experts: x[order // A].

    Args:
        x_mD: tokens.
        order_R: assignments in the order of their experts.
        inverse_mA: row of each assignment.
    """
    return x_mD[order_R // inverse_mA.shape[1]]


def _dispatch_forward(
    x_mD: Float[Array, "m D"], order_R: Int[Array, " R"], inverse_mA: Int[Array, "m A"]
) -> tuple[Float[Array, "R D"], Int[Array, "m A"]]:
    return dispatch_tokens(x_mD, order_R, inverse_mA), inverse_mA


def _dispatch_backward(inverse_mA: Int[Array, "m A"], dy_RD: Float[Array, "R D"]) -> tuple[Float[Array, "m D"], None, None]:
    # A token's gradient is the sum over the rows that it was copied to.
    dx_mD = sum(dy_RD[inverse_mA[:, a]] for a in range(inverse_mA.shape[1]))
    return dx_mD, None, None  # type: ignore[return-value]  # mypy: sum() may be 0


dispatch_tokens.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine_rows(
    y_RD: Float[Array, "R D"], weights_mA: Float[Array, "m A"], order_R: Int[Array, " R"], inverse_mA: Int[Array, "m A"]
) -> Float[Array, "m D"]:
    """Compute the sum over a of weights[m, a] * y[row of assignment (m, a)], in float32.

    Args:
        y_RD: outputs of the rows.
        weights_mA: router weights.
        order_R: assignments in the order of their experts.
        inverse_mA: row of each assignment.
    """
    A = weights_mA.shape[1]
    first, *others = (weights_mA[:, a, None] * y_RD[inverse_mA[:, a]].astype(jnp.float32) for a in range(A))
    return sum(others, start=first)


_CombineResiduals = tuple[Float[Array, "R D"], Float[Array, "m A"], Int[Array, " R"], Int[Array, "m A"]]


def _combine_forward(
    y_RD: Float[Array, "R D"], weights_mA: Float[Array, "m A"], order_R: Int[Array, " R"], inverse_mA: Int[Array, "m A"]
) -> tuple[Float[Array, "m D"], _CombineResiduals]:
    return combine_rows(y_RD, weights_mA, order_R, inverse_mA), (y_RD, weights_mA, order_R, inverse_mA)


def _combine_backward(
    saved: _CombineResiduals, d_mD: Float[Array, "m D"]
) -> tuple[Float[Array, "R D"], Float[Array, "m A"], None, None]:
    y_RD, weights_mA, order_R, inverse_mA = saved
    A = weights_mA.shape[1]
    dy_RD = (weights_mA.reshape(-1)[order_R, None] * d_mD[order_R // A]).astype(y_RD.dtype)
    dots = [jnp.sum(d_mD * y_RD[inverse_mA[:, a]].astype(jnp.float32), axis=-1) for a in range(A)]
    return dy_RD, jnp.stack(dots, axis=1).astype(weights_mA.dtype), None, None


combine_rows.defvjp(_combine_forward, _combine_backward)
