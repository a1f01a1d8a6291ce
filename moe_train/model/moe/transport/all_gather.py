"""Tokens to their experts and back where each device sees all tokens of its `expert` axis: the transport `all_gather`.

Local view, inside `shard_map`: lower-case letters are this device's part of a dim. R rows, one for each assignment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_train.model.sharding.collectives import gather, scatter


def all_gather(
    x_mD: jax.Array,
    ids_mA: jax.Array,
    weights_mA: jax.Array,
    experts: Any,
    draws: Any,
    run: Any,
    whole: Any,
    most: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each device sees all tokens of its `expert` axis, and computes the assignments of its own experts; the sums are
    scattered back. Arguments and results as `exchange` has them."""
    experts = whole(experts)
    key, numbers_mA = draws
    x_mD, ids_mA, weights_mA = (gather(x, "expert", 0) for x in (x_mD, ids_mA, weights_mA))
    e, A = experts.gate.weight.shape[0], ids_mA.shape[1]
    own_mA = ids_mA - jax.lax.axis_index("expert") * e
    own_mA = jnp.where((own_mA >= 0) & (own_mA < e), own_mA, e)  # e: not ours
    order_R = checkpoint_name(jnp.argsort(own_mA.reshape(-1), stable=True), "routing")
    inverse_mA = checkpoint_name(jnp.argsort(order_R).reshape(-1, A), "routing")
    group_sizes_e = jnp.sum(own_mA.reshape(-1, 1) == jnp.arange(e), axis=0, dtype=jnp.int32)
    numbers_R = None if numbers_mA is None else gather(numbers_mA, "expert", 0).reshape(-1)[order_R]
    y_RD = run(dispatch(x_mD, order_R, inverse_mA), group_sizes_e, experts, key, numbers_R)
    y_mD = combine(y_RD, jnp.where(own_mA < e, weights_mA, 0), order_R, inverse_mA).astype(x_mD.dtype)
    return scatter(jax.lax.psum(y_mD, "tensor"), "expert", 0), jnp.sum(group_sizes_e)


# Both ways are gathers, and so are their gradients: a scatter-add is serial on CPU and unordered on GPU.


@jax.custom_vjp
def dispatch(x_mD: jax.Array, order_R: jax.Array, inverse_mA: jax.Array) -> jax.Array:
    """Rows of the assignments in the order of their experts: x[order // A]."""
    return x_mD[order_R // inverse_mA.shape[1]]


def _dispatch_forward(x_mD, order_R, inverse_mA):
    return dispatch(x_mD, order_R, inverse_mA), inverse_mA


def _dispatch_backward(inverse_mA, dy_RD):
    return sum(dy_RD[inverse_mA[:, a]] for a in range(inverse_mA.shape[1])), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_RD: jax.Array, weights_mA: jax.Array, order_R: jax.Array, inverse_mA: jax.Array) -> jax.Array:
    """sum over a of weights[m, a] * y[row of assignment (m, a)], in float32."""
    A = weights_mA.shape[1]
    first, *others = (weights_mA[:, a, None] * y_RD[inverse_mA[:, a]].astype(jnp.float32) for a in range(A))
    return sum(others, start=first)


def _combine_forward(y_RD, weights_mA, order_R, inverse_mA):
    return combine(y_RD, weights_mA, order_R, inverse_mA), (y_RD, weights_mA, order_R, inverse_mA)


def _combine_backward(saved, d_mD):
    y_RD, weights_mA, order_R, inverse_mA = saved
    A = weights_mA.shape[1]
    dy_RD = (weights_mA.reshape(-1)[order_R, None] * d_mD[order_R // A]).astype(y_RD.dtype)
    dots = [jnp.sum(d_mD * y_RD[inverse_mA[:, a]].astype(jnp.float32), axis=-1) for a in range(A)]
    return dy_RD, jnp.stack(dots, axis=1).astype(weights_mA.dtype), None, None


combine.defvjp(_combine_forward, _combine_backward)
