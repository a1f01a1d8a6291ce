"""Transport `all_to_all`: assignments are sent to the device of the `expert` axis that holds their expert, and back.

Every device has a bucket of rows for every other one. `jax.lax.all_to_all` exchanges whole buckets, full or not, of rows,
expert ids and router weights. `chunks` repeats the exchange until every assignment has been sent.

Local view; X devices of the axis, S = X * bucket size rows of a chunk, n = m * A assignments of this device's tokens.
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

NAME: Final[TransportName] = "all_to_all"
RECOMPUTES_EXPERTS: Final = True


def run_experts(assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes) -> Combined:
    """Exchange buckets until every assignment has reached its expert. See `transport.Transport`."""
    size = bucket_size(sizes)
    routes, num_chunks = bucket_routes(assignments.expert_ids_mA, experts.count, size)
    inputs = ChunkInputs(assignments.x_mD, assignments.weights_mA, experts.weights)
    routing = ChunkRouting(routes, num_chunks, assignments.dropout_mA)
    y_mD = sum_over_chunks(partial(exchange_chunk, size=size, experts=experts), experts.unshard, inputs, routing)
    return Combined(y_mD, jnp.sum(routes.counts_X))


def received(sizes: ExchangeSizes) -> dict[str, int]:
    """Return the bytes of X - 1 buckets, exchanged five times: whole buckets are sent, whatever they contain."""
    rows = (sizes.devices - 1) * bucket_size(sizes)
    return {"all-to-all": 5 * rows * sizes.model_dim * sizes.itemsize}


def rows_at_once(sizes: ExchangeSizes) -> int:
    """Return the number of rows of one bucket from each device."""
    return sizes.devices * bucket_size(sizes)


class BucketRoutes(NamedTuple):
    """Destinations of the assignments of this device."""

    order_n: Int[Array, " n"]
    """Assignments in the order of their experts."""
    rank_mA: Int[Array, "m A"]
    """Position of each assignment in that order, counted from the first assignment for the same device."""
    device_mA: Int[Array, "m A"]
    """Device that holds the expert; X for an assignment that is sent nowhere."""
    expert_n: Int[Array, " n"]
    """Index of the expert on its device, in that order."""
    starts_X: Int[Array, " X"]
    """Position of the first assignment for each device, in that order."""
    counts_X: Int[Array, " X"]
    """Number of assignments for each device."""


def bucket_routes(expert_ids_mA: Int[Array, "m A"], experts_per_device: int, size: int) -> tuple[BucketRoutes, Int[Array, ""]]:
    """Compute the destinations of this device's assignments.

    Args:
        expert_ids_mA: ids among all experts; X * experts_per_device for an assignment that is sent nowhere.
        experts_per_device: number of experts on each device.
        size: rows of a bucket.

    Returns:
        The routes, and the number of chunks that buckets of `size` rows take; it is the same on all devices.
    """
    X = axis_size("expert")
    A = expert_ids_mA.shape[1]
    e = experts_per_device
    order_n = jnp.argsort(expert_ids_mA.reshape(-1), stable=True)
    place_mA = jnp.argsort(order_n).reshape(-1, A)
    # Each device holds a run of e experts; the id that means nowhere, X * e, gives device X.
    device_mA = expert_ids_mA // e
    counts_X = jnp.sum(device_mA.reshape(-1, 1) == jnp.arange(X), axis=0, dtype=jnp.int32)
    starts_X = jnp.cumsum(counts_X) - counts_X
    # The appended entry is for device X; the ranks of assignments that are sent nowhere are not used.
    rank_mA = place_mA - jnp.append(starts_X, 0)[device_mA]
    # All devices of a replica must run the same number of chunks, or the collectives would wait forever.
    num_chunks = jax.lax.pmax(jnp.max(-(-counts_X // size)), ("fsdp", "expert", "context"))
    expert_n = expert_ids_mA.reshape(-1)[order_n] % e
    return BucketRoutes(order_n, rank_mA, device_mA, expert_n, starts_X, counts_X), num_chunks


def exchange_chunk(
    i: Int[Array, ""], inputs: ChunkInputs, routing: ChunkRouting, size: int, experts: LocalExperts
) -> Float[Array, "m D"]:
    """Compute what chunk i adds to each token: the assignments with ranks i * size … (i + 1) * size - 1 of every bucket."""
    routes: BucketRoutes = routing.routes
    X = routes.counts_X.shape[0]
    A = inputs.weights_mA.shape[1]
    rank_Xs = i * size + jnp.arange(size) + jnp.zeros((X, 1), jnp.int32)
    used_S = (rank_Xs < routes.counts_X[:, None]).reshape(-1)
    # Unused rows read position 0 and are made harmless below: zeros, the expert id e (none), and weight 0.
    at_S = jnp.where(used_S, (routes.starts_X[:, None] + rank_Xs).reshape(-1), 0)
    assignment_S = routes.order_n[at_S]
    # The same mapping from the side of the tokens, which sums need: the row of each assignment that this chunk sends.
    present_mA = (routes.rank_mA // size == i) & (routes.device_mA < X)
    row_mA = jnp.where(present_mA, routes.device_mA * size + routes.rank_mA % size, 0)
    placement = Placement(assignment_S // A, used_S, row_mA, present_mA)

    # To the experts: every device receives a bucket from each device.
    expert_S = _exchange(jnp.where(used_S, routes.expert_n[at_S], experts.count))
    weight_S = _exchange(jnp.where(used_S, inputs.weights_mA.reshape(-1)[assignment_S], 0))
    x_SD = _exchange(to_rows(inputs.x_mD, placement))
    dropout_S = None
    if routing.dropout_mA is not None:
        counters_n = routing.dropout_mA.counters.reshape(-1)
        dropout_S = routing.dropout_mA._replace(counters=_exchange(counters_n[assignment_S]))
    y_SD = apply_experts(ReceivedRows(x_SD, expert_S, weight_S[:, None], dropout_S), experts, inputs.experts)
    # Back to the tokens.
    return from_rows(_exchange(y_SD).astype(jnp.float32), placement)


def _exchange(x_S: Shaped[Array, "S ..."]) -> Shaped[Array, "S ..."]:
    """Exchange a bucket for each device for a bucket from each device."""
    return jax.lax.all_to_all(x_S, "expert", split_axis=0, concat_axis=0, tiled=True)
