"""Transport `ragged_all_to_all`: as `all_to_all`, but each device sends exactly the assignments that exist.

A device receives the rows of all others one after the other in one buffer, as large as all buckets of `all_to_all` together.
It overflows only if the device's total load is more than a quarter above the balanced load, wherever that load comes from.
What does not fit is sent in a further chunk, as in `all_to_all`. All devices know how many assignments each has for each
expert, and so which rows come from where: no expert ids are sent, only rows and router weights.

XLA:CPU does not implement this collective. Compiled for 64 v5p chips (two layers of Mixtral 8x7B, fsdp 8 x expert 8, a
sequence of 4096 per chip), a chip receives 602 MB of rows where the buckets of all_to_all are 734 MB, 3.99 GB of all kinds
against 4.12 GB, with 3.94 GiB of memory against 3.93 GiB. So `auto` chooses it on TPUs, and a run that uses it first compares
it with all_gather on its own devices (`run.self_test`).

Local view; S rows of the buffer of a chunk, n = m * A assignments of this device's tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe_train.machine.mesh import axis_size
from moe_train.model.moe.transport.chunks import ChunkInputs, ChunkRouting, bucket_size, sum_over_chunks
from moe_train.model.moe.transport.rows import Placement, ReceivedRows, apply_experts, from_rows, to_rows
from moe_train.model.moe.transport.transport import Assignments, Combined, ExchangeSizes, LocalExperts, TransportName

NAME: Final[TransportName] = "ragged_all_to_all"
RECOMPUTES_EXPERTS: Final = True


def run_experts(assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes) -> Combined:
    """Exchange rows until every assignment has reached its expert. See `transport.Transport`."""
    rows = rows_at_once(sizes)
    routes, num_chunks = _routes(assignments.expert_ids_mA, experts.count, rows)
    inputs = ChunkInputs(assignments.x_mD, assignments.weights_mA, experts.weights)
    routing = ChunkRouting(routes, num_chunks, assignments.dropout_mA)
    y_mD = sum_over_chunks(partial(_exchange_chunk, rows=rows, experts=experts), experts.unshard, inputs, routing)
    return Combined(y_mD, jnp.sum(routes.sent_XX[jax.lax.axis_index("expert")]))


def received(sizes: ExchangeSizes) -> dict[str, int]:
    """Return the bytes of the assignments that other devices hold for this one's experts, exchanged five times.

    These are (X - 1) / X * m * A rows.
    """
    rows = (sizes.devices - 1) * sizes.assignments // sizes.devices
    return {"ragged-all-to-all": 5 * rows * sizes.model_dim * sizes.itemsize}


def rows_at_once(sizes: ExchangeSizes) -> int:
    """Return the number of rows of the buffer, that of all buckets of `all_to_all` together."""
    return sizes.devices * bucket_size(sizes)


class RaggedRoutes(NamedTuple):
    """Destinations of the assignments; X by X matrices are [from, to] and the same on all devices of the axis."""

    order_n: Int[Array, " n"]
    """Assignments of this device in the order of their experts; those that are sent nowhere come last."""
    place_mA: Int[Array, "m A"]
    """Position of each assignment in that order."""
    counts_XE: Int[Array, "X E"]
    """Number of assignments of each device to each expert."""
    starts_XX: Int[Array, "X X"]
    """Position of the first assignment for a device, in the order of the device that sends it."""
    into_XX: Int[Array, "X X"]
    """Position of that assignment among all that its receiver gets."""
    sent_XX: Int[Array, "X X"]
    """Number of assignments from one device to another."""


def _routes(expert_ids_mA: Int[Array, "m A"], experts_per_device: int, rows: int) -> tuple[RaggedRoutes, Int[Array, ""]]:
    """Compute the destinations of the assignments of all devices.

    Args:
        expert_ids_mA: ids among all experts; X * experts_per_device for an assignment that is sent nowhere.
        experts_per_device: number of experts on each device.
        rows: rows of the buffer.

    Returns:
        The routes, and the number of chunks that a buffer of `rows` rows takes; it is the same on all devices.
    """
    X = axis_size("expert")
    A = expert_ids_mA.shape[1]
    order_n = jnp.argsort(expert_ids_mA.reshape(-1), stable=True)
    place_mA = jnp.argsort(order_n).reshape(-1, A)
    counts_E = jnp.sum(expert_ids_mA.reshape(-1, 1) == jnp.arange(X * experts_per_device), axis=0, dtype=jnp.int32)
    counts_XE = jax.lax.all_gather(counts_E, "expert")
    sent_XX = jnp.sum(counts_XE.reshape(X, X, experts_per_device), axis=2)
    starts_XX = jnp.cumsum(sent_XX, axis=1) - sent_XX
    into_XX = jnp.cumsum(sent_XX, axis=0) - sent_XX
    # The fullest receiver decides. All devices must agree, or the collectives would wait forever (as in `all_to_all`).
    num_chunks = jax.lax.pmax(-(-jnp.max(jnp.sum(sent_XX, axis=0)) // rows), ("fsdp", "expert", "context"))
    return RaggedRoutes(order_n, place_mA, counts_XE, starts_XX, into_XX, sent_XX), num_chunks


class Window(NamedTuple):
    """The rows that one chunk moves, in the form that `jax.lax.ragged_all_to_all` takes: to the experts, and back to the tokens.

    "Home" is the device of the tokens.
    """

    start_X: Int[Array, " X"]
    """At home: the first row for each device."""
    size_X: Int[Array, " X"]
    """At home: the number of rows for each device."""
    at_X: Int[Array, " X"]
    """Position of these rows in the buffer of that device."""
    back_start_X: Int[Array, " X"]
    """At the experts: the first row from each device."""
    back_size_X: Int[Array, " X"]
    """At the experts: the number of rows from each device."""
    back_at_X: Int[Array, " X"]
    """Position of these rows at their home."""


def _window(i: Int[Array, ""], routes: RaggedRoutes, rows: int) -> Window:
    """Return the window of chunk i: rows i * rows … (i + 1) * rows - 1 of all that each device receives."""
    me = jax.lax.axis_index("expert")
    first = i * rows
    low_XX = jnp.clip(routes.into_XX, first, first + rows)
    size_XX = jnp.clip(routes.into_XX + routes.sent_XX, first, first + rows) - low_XX
    start_XX = routes.starts_XX + low_XX - routes.into_XX
    at_XX = low_XX - first
    # In [from, to] matrices, row `me` is what this device sends and column `me` what it receives.
    return Window(start_XX[me], size_XX[me], at_XX[me], at_XX[:, me], size_XX[:, me], start_XX[:, me])


def _exchange_chunk(
    i: Int[Array, ""], inputs: ChunkInputs, routing: ChunkRouting, rows: int, experts: LocalExperts
) -> Float[Array, "m D"]:
    """Compute what chunk i adds to each token."""
    routes: RaggedRoutes = routing.routes
    X, E = routes.counts_XE.shape
    m, A = inputs.weights_mA.shape
    n = m * A
    e = E // X
    me = jax.lax.axis_index("expert")
    window = _window(i, routes, rows)
    # The rows at home are all assignments of this device in every chunk; the window selects those that are moved.
    used_n = jnp.arange(n) < jnp.sum(routes.sent_XX[me])
    placement = Placement(routes.order_n // A, used_n, routes.place_mA, routes.place_mA < jnp.sum(routes.sent_XX[me]))

    # To the experts: the rows of device 0, of device 1, …, those of each device in the order of their experts.
    x_SD = _to_experts(to_rows(inputs.x_mD, placement), window, rows, n)
    weight_S = _to_experts(inputs.weights_mA.reshape(-1)[routes.order_n], window, rows, n)
    # `ends` lists e experts for each sending device, so the remainder of a position in it is the expert's index.
    ends_Xe = jnp.cumsum(jax.lax.dynamic_slice_in_dim(routes.counts_XE, me * e, e, axis=1))
    row_S = i * rows + jnp.arange(rows)
    expert_S = jnp.where(row_S < ends_Xe[-1], jnp.searchsorted(ends_Xe, row_S, side="right", method="compare_all") % e, e)
    dropout_S = None
    if routing.dropout_mA is not None:
        counters_n = routing.dropout_mA.counters.reshape(-1)[routes.order_n]
        dropout_S = routing.dropout_mA._replace(counters=_to_experts(counters_n, window, rows, n))
    y_SD = apply_experts(ReceivedRows(x_SD, expert_S, weight_S.reshape(-1, 1), dropout_S), experts, inputs.experts)
    # Back to the tokens: positions that this chunk has no row for are zero.
    return from_rows(_to_tokens(y_SD, window, rows, n).astype(jnp.float32), placement)


def _move(
    x: Shaped[Array, "..."],
    rows: int,
    start_X: Int[Array, " X"],
    size_X: Int[Array, " X"],
    at_X: Int[Array, " X"],
    received_X: Int[Array, " X"],
) -> Shaped[Array, "..."]:
    """Send slices of x to the other devices, and return the buffer of `rows` rows that this device receives."""
    buffer = jax.lax.full_like(x, 0, shape=(rows, *x.shape[1:]))
    return jax.lax.ragged_all_to_all(x, buffer, start_X, size_X, at_X, received_X, axis_name="expert")


# Each of the two is the gradient of the other. `rows` is the size of the buffer at the experts, `n` the number of rows at home.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _to_experts(x_n: Shaped[Array, "n ..."], window: Window, rows: int, n: int) -> Shaped[Array, "S ..."]:
    """Send rows from home to their experts."""
    return _move(x_n, rows, window.start_X, window.size_X, window.at_X, window.back_size_X)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _to_tokens(y_S: Shaped[Array, "S ..."], window: Window, rows: int, n: int) -> Shaped[Array, "n ..."]:
    """Send rows from their experts back home."""
    return _move(y_S, n, window.back_start_X, window.back_size_X, window.back_at_X, window.size_X)


_to_experts.defvjp(
    lambda x, window, rows, n: (_to_experts(x, window, rows, n), window),
    lambda rows, n, window, dx: (_to_tokens(dx, window, rows, n), None),
)
_to_tokens.defvjp(
    lambda y, window, rows, n: (_to_tokens(y, window, rows, n), window),
    lambda rows, n, window, dy: (_to_experts(dy, window, rows, n), None),
)
