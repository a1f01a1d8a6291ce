"""The transport `ragged_all_to_all`: as `exchange`, but each device sends exactly the assignments that there are.

A device receives the rows of all others one after the other in one buffer as large as `exchange`'s, which fills only
when the device's own load is a quarter over the balanced one, wherever that load comes from. What does not fit goes in
a further round, as there. All devices know how many assignments each has for each expert, and so what comes from where:
no ids travel.

XLA:CPU has not this collective. Compiled for 64 v5p chips (two layers of Mixtral 8x7B, fsdp 8 x expert 8, a sequence of
4096 a chip) a chip receives 602 MB of rows where all_to_all's buffers are 734 MB, 3.99 GB of all kinds where it is 4.12,
with 3.94 GiB of memory where it is 3.93. So `auto` takes it on TPUs, and a run that does first compares it with
all_gather on its own devices (`train.self_test`).

Local view; S = X * slots rows of a round, n = m * A assignments of this device's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_train.machine.mesh import axis_size
from moe_train.model.moe.transport.all_to_all import Experts, from_slots, in_rounds, permute, slots_of, to_slots


class Plan(NamedTuple):
    """Which assignments go where; X by X matrices are [from, to] and the same on all devices of the axis."""

    order_n: jax.Array
    """Assignments of this device in the order of their experts; those that go nowhere last."""
    place_mA: jax.Array
    """Place of each assignment in that order."""
    counts_XE: jax.Array
    """Assignments of each device to each expert."""
    starts_XX: jax.Array
    """Place of the first assignment for a device, in the order of the device that sends it."""
    into_XX: jax.Array
    """Place of that assignment in all that its receiver gets."""
    sent_XX: jax.Array
    rounds: jax.Array
    """The same number on every device of a replica."""


def make_plan(expert_ids_mA: jax.Array, experts_here: int, rows: int) -> Plan:
    """As `exchange.make_plan`; rows: of one round."""
    X, A = axis_size("expert"), expert_ids_mA.shape[1]
    order_n = jnp.argsort(expert_ids_mA.reshape(-1), stable=True)
    place_mA = jnp.argsort(order_n).reshape(-1, A)
    counts_E = jnp.sum(expert_ids_mA.reshape(-1, 1) == jnp.arange(X * experts_here), axis=0, dtype=jnp.int32)
    counts_XE = jax.lax.all_gather(counts_E, "expert")
    sent_XX = jnp.sum(counts_XE.reshape(X, X, experts_here), axis=2)
    starts_XX = jnp.cumsum(sent_XX, axis=1) - sent_XX
    into_XX = jnp.cumsum(sent_XX, axis=0) - sent_XX
    rounds = jax.lax.pmax(-(-jnp.max(jnp.sum(sent_XX, axis=0)) // rows), ("fsdp", "expert", "context"))
    return Plan(order_n, place_mA, counts_XE, starts_XX, into_XX, sent_XX, rounds)


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
    """Arguments and results as `exchange.exchange` has them."""
    X = axis_size("expert")
    rows, e = X * slots_of(ids_mA.size, X, most), jax.tree.leaves(experts)[0].shape[0]
    plan = make_plan(ids_mA, e, rows)
    y_mD = in_rounds(partial(_round, rows=rows, run=run), x_mD, weights_mA, experts, plan, draws, whole)
    return y_mD, jnp.sum(plan.sent_XX[jax.lax.axis_index("expert")])


class Window(NamedTuple):
    """What one round moves, as `jax.lax.ragged_all_to_all` has it: from home to the experts, and back."""

    start_X: jax.Array
    """At home: the first row for each device."""
    size_X: jax.Array
    at_X: jax.Array
    """There: where these rows begin in its buffer."""
    back_start_X: jax.Array
    """At the experts: the first row from each device."""
    back_size_X: jax.Array
    back_at_X: jax.Array
    """At its home: where these rows begin."""


def _window(i: jax.Array, plan: Plan, rows: int) -> Window:
    me, first = jax.lax.axis_index("expert"), i * rows
    low_XX = jnp.clip(plan.into_XX, first, first + rows)
    size_XX = jnp.clip(plan.into_XX + plan.sent_XX, first, first + rows) - low_XX
    start_XX = plan.starts_XX + low_XX - plan.into_XX
    at_XX = low_XX - first
    return Window(start_XX[me], size_XX[me], at_XX[me], at_XX[:, me], size_XX[:, me], start_XX[:, me])


def _round(
    i: jax.Array, x_mD: jax.Array, weights_mA: jax.Array, experts: Any, plan: Plan, draws: Any, rows: int, run: Experts
) -> jax.Array:
    """What round i adds to each token's sum."""
    X, E, A = *plan.counts_XE.shape, weights_mA.shape[1]
    n, e, me = weights_mA.size, E // X, jax.lax.axis_index("expert")
    window = _window(i, plan, rows)
    here_n = jnp.arange(n) < jnp.sum(plan.sent_XX[me])
    places = (plan.order_n // A, here_n, plan.place_mA, plan.place_mA < jnp.sum(plan.sent_XX[me]))

    # There: row after row from device 0, 1, …, each device's in the order of their experts.
    x_SD = _there(to_slots(x_mD, places), window, rows, n)
    weight_S = _there(weights_mA.reshape(-1)[plan.order_n], window, rows, n)
    ends_Xe = jnp.cumsum(jax.lax.dynamic_slice_in_dim(plan.counts_XE, me * e, e, axis=1))
    row_S = i * rows + jnp.arange(rows)
    expert_S = jnp.where(row_S < ends_Xe[-1], jnp.searchsorted(ends_Xe, row_S, side="right", method="compare_all") % e, e)
    order_S = jnp.argsort(expert_S, stable=True)
    inverse_S = jnp.argsort(order_S)
    sizes_e = jnp.sum(expert_S[:, None] == jnp.arange(e), axis=0, dtype=jnp.int32)
    key, numbers_mA = draws
    numbers_S = None if numbers_mA is None else _there(numbers_mA.reshape(-1)[plan.order_n], window, rows, n)[order_S]
    y_SD = run(permute(x_SD, order_S, inverse_S), sizes_e, experts, key, numbers_S)
    y_SD = permute(y_SD, inverse_S, order_S) * weight_S.reshape(-1, 1).astype(y_SD.dtype)
    # And back: places that this round has no row for are zero.
    return from_slots(_back(y_SD, window, rows, n).astype(jnp.float32), places)


def _move(x: jax.Array, rows: int, start_X: jax.Array, size_X: jax.Array, at_X: jax.Array, coming_X: jax.Array) -> jax.Array:
    room = jax.lax.full_like(x, 0, shape=(rows, *x.shape[1:]))
    return jax.lax.ragged_all_to_all(x, room, start_X, size_X, at_X, coming_X, axis_name="expert")


# Each is the other's gradient. rows, places: of the buffers there and at home.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _there(x_n: jax.Array, window: Window, rows: int, places: int) -> jax.Array:
    """Rows at their homes -> rows at their experts."""
    return _move(x_n, rows, window.start_X, window.size_X, window.at_X, window.back_size_X)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _back(y_S: jax.Array, window: Window, rows: int, places: int) -> jax.Array:
    """Rows at their experts -> rows at their homes."""
    return _move(y_S, places, window.back_start_X, window.back_size_X, window.back_at_X, window.size_X)


_there.defvjp(
    lambda x, window, rows, places: (_there(x, window, rows, places), window),
    lambda rows, places, window, dx: (_back(dx, window, rows, places), None),
)
_back.defvjp(
    lambda y, window, rows, places: (_back(y, window, rows, places), window),
    lambda rows, places, window, dy: (_there(dy, window, rows, places), None),
)
