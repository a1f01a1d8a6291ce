"""Copy tokens to the rows of a buffer, apply the experts there, and sum rows back to tokens. Local view.

All copies are gathers, and so are their gradients: a scatter-add is serial on CPU and has no fixed order on GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_train.model.moe.transport.transport import DropoutCounters, LocalExperts


class Placement(NamedTuple):
    """The mapping between tokens and the S rows of a buffer, in both directions."""

    token_S: Int[Array, " S"]
    """Token of each row."""
    used_S: Bool[Array, " S"]
    """Whether the row holds an assignment."""
    row_mA: Int[Array, "m A"]
    """Row of each assignment."""
    present_mA: Bool[Array, "m A"]
    """Whether the assignment is in this buffer."""


@jax.custom_vjp
def to_rows(x_mD: Float[Array, "m D"], placement: Placement) -> Float[Array, "S D"]:
    """Copy tokens (m, D) to rows (S, D): the token of each used row, zeros elsewhere."""
    return jnp.where(placement.used_S[:, None], x_mD[placement.token_S], 0)


@jax.custom_vjp
def from_rows(y_SD: Float[Array, "S D"], placement: Placement) -> Float[Array, "m D"]:
    """Sum rows (S, D) to tokens (m, D): the sum of each token's rows."""
    row_mA = placement.row_mA
    present_mA = placement.present_mA
    first, *others = (jnp.where(present_mA[:, a, None], y_SD[row_mA[:, a]], 0) for a in range(row_mA.shape[1]))
    return sum(others, start=first)


# Each of the two is the gradient of the other.
to_rows.defvjp(lambda x, at: (to_rows(x, at), at), lambda at, dx: (from_rows(dx, at), None))
from_rows.defvjp(lambda y, at: (from_rows(y, at), at), lambda at, dy: (to_rows(dy, at), None))


@jax.custom_vjp
def permute(x_SD: Float[Array, "S D"], order_S: Int[Array, " S"], inverse_S: Int[Array, " S"]) -> Float[Array, "S D"]:
    """Reorder the rows: x[order].

    Args:
        x_SD: rows.
        order_S: the permutation.
        inverse_S: its inverse: order[inverse] is 0, 1, 2, …
    """
    return x_SD[order_S]


# The gradient of x[order] would be a scatter; with the inverse permutation it is a gather, too.
permute.defvjp(lambda x, o, i: (x[o], (o, i)), lambda saved, dx: (dx[saved[1]], None, None))


class ReceivedRows(NamedTuple):
    """Rows that arrived for this device's experts, in any order."""

    x_SD: Float[Array, "S D"]
    expert_S: Int[Array, " S"]
    """Index among this device's e experts; e for an unused row."""
    weight_S1: Float[Array, "S 1"]
    """Router weight of the assignment; 0 for an unused row."""
    dropout_S: DropoutCounters | None


def apply_experts(rows: ReceivedRows, experts: LocalExperts, weights: Any) -> Float[Array, "S D"]:
    """Sort rows by expert, apply the experts, restore the order and multiply by the router weights.

    The router weights are applied here and not on the token's own device. So no gradient needs the experts' outputs, and the
    backward pass does not send them again.

    Args:
        rows: received rows.
        experts: this device's experts.
        weights: weights of `experts`, unsharded.

    Returns:
        The weighted outputs (S, D), in the order of `rows`.
    """
    # Unused rows have the id e, so they sort last, past all groups.
    order_S = jnp.argsort(rows.expert_S, stable=True)
    inverse_S = jnp.argsort(order_S)
    group_sizes_e = jnp.sum(rows.expert_S[:, None] == jnp.arange(experts.count), axis=0, dtype=jnp.int32)
    dropout_S = None
    if rows.dropout_S is not None:
        dropout_S = rows.dropout_S._replace(counters=rows.dropout_S.counters[order_S])
    y_SD = experts.apply(permute(rows.x_SD, order_S, inverse_S), group_sizes_e, weights, dropout_S)
    return permute(y_SD, inverse_S, order_S) * rows.weight_S1.astype(y_SD.dtype)
