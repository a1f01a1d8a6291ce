"""The transport `all_to_all`: assignments travel to the device of the `expert` axis that holds their expert, and back.

Buffers are fixed: every device has `slots` rows for every other one, a quarter more than balanced routing fills.
What does not fit goes in a further round, and all devices do as many rounds as the fullest buffer of any of them
needs: nothing is dropped whatever the routing, and balanced routing takes one round. The backward pass goes through
the same rounds again, from the layer's inputs: no round leaves anything in memory.

Buffers for the worst case, compiled for 8 v5p chips (tests/benchmarks/buffers.py), would take 3.7 GiB in a layer where these
take 1.8, 2.5 times the operations beside kernels, and 3.2 times the bytes received. As the other branch of a `lax.cond` they
are seldom used, and take the memory still: 4.1 GiB.

Local view: inside `shard_map`; lower-case letters are this device's part of a dim. X devices of the axis, S = X *
slots rows of a round, n = m * A assignments of this device's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_train.machine.mesh import axis_size

SLACK = 1.25
"""Rows of a buffer over those that balanced routing fills."""

Experts = Callable[[jax.Array, jax.Array, Any, Any, Any], jax.Array]
"""(rows in the order of their experts, rows of each expert, weights, key, number of each row) -> rows."""


class Plan(NamedTuple):
    """Where each assignment of this device goes."""

    order_n: jax.Array
    """Assignments in the order of their experts."""
    rank_mA: jax.Array
    """Place of each assignment in that order, counted from the first one of its device."""
    device_mA: jax.Array
    """Device that holds the expert; X for an assignment that goes nowhere."""
    expert_n: jax.Array
    """In that order: number of the expert on its device."""
    starts_X: jax.Array
    """In that order: the first assignment of each device."""
    counts_X: jax.Array
    rounds: jax.Array
    """The same number on every device of a replica."""


def slots_of(assignments: int, devices: int, most: int | None = None) -> int:
    """Rows of one buffer, for a device with so many assignments, of which at most `most` go to one other device."""
    unit = max(1, min(512, assignments) // devices)  # whole tiles of the kernels' rows, together
    rows = math.ceil(SLACK * assignments / devices)
    return -(-min(rows, most or rows) // unit) * unit


def make_plan(expert_ids_mA: jax.Array, experts_here: int, slots: int) -> Plan:
    """expert_ids: of all experts of the axis; their number, X * experts_here, for an assignment that goes nowhere."""
    X, e, A = axis_size("expert"), experts_here, expert_ids_mA.shape[1]
    order_n = jnp.argsort(expert_ids_mA.reshape(-1), stable=True)
    place_mA = jnp.argsort(order_n).reshape(-1, A)
    device_mA = expert_ids_mA // e
    counts_X = jnp.sum(device_mA.reshape(-1, 1) == jnp.arange(X), axis=0, dtype=jnp.int32)
    starts_X = jnp.cumsum(counts_X) - counts_X
    rank_mA = place_mA - jnp.append(starts_X, 0)[device_mA]
    rounds = jax.lax.pmax(jnp.max(-(-counts_X // slots)), ("fsdp", "expert", "context"))
    return Plan(order_n, rank_mA, device_mA, expert_ids_mA.reshape(-1)[order_n] % e, starts_X, counts_X, rounds)


def exchange(
    x_mD: jax.Array,
    ids_mA: jax.Array,
    weights_mA: jax.Array,
    experts: Any,
    draws: tuple[Any, Any],
    run: Experts,
    whole: Callable[[Any], Any],
    most: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum over its assignments of weight * expert(x), and the number of assignments of this device.

    ids: of all experts of the axis; their number, for an assignment that goes nowhere. experts: this device's part of
    the weights; whole: these -> as `run` wants them. draws: the key of dropout and the number of each assignment, or None.
    most: assignments of a device that can go to one other.
    """
    slots = slots_of(ids_mA.size, axis_size("expert"), most)
    plan = make_plan(ids_mA, jax.tree.leaves(experts)[0].shape[0], slots)
    y_mD = in_rounds(partial(_round, slots=slots, run=run), x_mD, weights_mA, experts, plan, draws, whole)
    return y_mD, jnp.sum(plan.counts_X)


def in_rounds(
    one: Callable[..., jax.Array],
    x_mD: jax.Array,
    weights_mA: jax.Array,
    experts: Any,
    plan: Any,
    draws: Any,
    whole: Callable[[Any], Any],
) -> jax.Array:
    """Sum of what `plan.rounds` rounds add to each token, over `tensor` too. one: (i, x, weights, experts as `whole` has
    them, plan, draws) -> what round i adds."""

    @jax.custom_vjp
    def rounds(x_mD: jax.Array, weights_mA: jax.Array, experts: Any, plan: Any, draws: Any) -> jax.Array:
        here = whole(experts)

        def add(i: jax.Array, y_mD: jax.Array) -> jax.Array:
            return y_mD + one(i, x_mD, weights_mA, here, plan, draws)

        return jax.lax.fori_loop(0, plan.rounds, add, jax.lax.full_like(x_mD, 0, jnp.float32))

    def forward(*inputs):
        return rounds(*inputs), inputs

    def backward(saved, dy_mD):
        x_mD, weights_mA, experts, plan, draws = saved
        here, scatter = jax.vjp(whole, experts)

        def add(i: jax.Array, total: Any) -> Any:
            _, vjp = jax.vjp(lambda x, weights, here: one(i, x, weights, here, plan, draws), x_mD, weights_mA, here)
            return jax.tree.map(jnp.add, total, vjp(dy_mD))

        zeros = jax.tree.map(lambda x: jax.lax.full_like(x, 0), (x_mD, weights_mA, here))
        dx_mD, dweights_mA, dhere = jax.lax.fori_loop(0, plan.rounds, add, zeros)
        return dx_mD, dweights_mA, *scatter(dhere), None, None

    rounds.defvjp(forward, backward)
    return jax.lax.psum(rounds(x_mD, weights_mA, experts, plan, draws), "tensor").astype(x_mD.dtype)


def _round(
    i: jax.Array, x_mD: jax.Array, weights_mA: jax.Array, experts: Any, plan: Plan, draws: Any, slots: int, run: Experts
) -> jax.Array:
    """What round i adds to each token's sum."""
    X, A = plan.counts_X.shape[0], weights_mA.shape[1]
    rank_XC = i * slots + jnp.arange(slots) + jnp.zeros((X, 1), jnp.int32)
    used_S = (rank_XC < plan.counts_X[:, None]).reshape(-1)
    at_S = jnp.where(used_S, (plan.starts_X[:, None] + rank_XC).reshape(-1), 0)
    assignment_S = plan.order_n[at_S]
    in_round_mA = (plan.rank_mA // slots == i) & (plan.device_mA < X)
    slot_mA = jnp.where(in_round_mA, plan.device_mA * slots + plan.rank_mA % slots, 0)
    slots_of_tokens = (assignment_S // A, used_S, slot_mA, in_round_mA)

    # There: every device receives `slots` rows of each other one, and sorts them by expert.
    e = jax.tree.leaves(experts)[0].shape[0]
    expert_S = _swap(jnp.where(used_S, plan.expert_n[at_S], e))
    weight_S = _swap(jnp.where(used_S, weights_mA.reshape(-1)[assignment_S], 0))
    x_SD = _swap(to_slots(x_mD, slots_of_tokens))
    order_S = jnp.argsort(expert_S, stable=True)
    inverse_S = jnp.argsort(order_S)
    sizes_e = jnp.sum(expert_S[:, None] == jnp.arange(e), axis=0, dtype=jnp.int32)
    key, numbers_mA = draws
    numbers_S = None if numbers_mA is None else _swap(numbers_mA.reshape(-1)[assignment_S])[order_S]
    y_SD = run(permute(x_SD, order_S, inverse_S), sizes_e, experts, key, numbers_S)
    # The weights are applied here, not at home: then no gradient needs y, and the backward pass does not send it again.
    y_SD = permute(y_SD, inverse_S, order_S) * weight_S[:, None].astype(y_SD.dtype)
    # And back.
    return from_slots(_swap(y_SD).astype(jnp.float32), slots_of_tokens)


def _swap(x_S: jax.Array) -> jax.Array:
    """Rows for each device -> rows from each device."""
    return jax.lax.all_to_all(x_S, "expert", split_axis=0, concat_axis=0, tiled=True)


# All of these are gathers, and so are their gradients: a scatter-add is serial on CPU and unordered on GPU.


@jax.custom_vjp
def to_slots(x_mD: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """(m, D) -> (S, D): the token of each used slot, zeros elsewhere."""
    token_S, used_S, _, _ = at
    return jnp.where(used_S[:, None], x_mD[token_S], 0)


@jax.custom_vjp
def from_slots(y_SD: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """(S, D) -> (m, D): the sum of each token's slots."""
    _, _, slot_mA, in_round_mA = at
    first, *others = (jnp.where(in_round_mA[:, a, None], y_SD[slot_mA[:, a]], 0) for a in range(slot_mA.shape[1]))
    return sum(others, start=first)


to_slots.defvjp(lambda x, at: (to_slots(x, at), at), lambda at, dx: (from_slots(dx, at), None))
from_slots.defvjp(lambda y, at: (from_slots(y, at), at), lambda at, dy: (to_slots(dy, at), None))


@jax.custom_vjp
def permute(x_SD: jax.Array, order_S: jax.Array, inverse_S: jax.Array) -> jax.Array:
    return x_SD[order_S]


permute.defvjp(lambda x, o, i: (x[o], (o, i)), lambda saved, dx: (dx[saved[1]], None, None))
