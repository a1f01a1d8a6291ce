"""The protocol of a transport: how tokens reach the devices of their experts, and how the results come back.

A transport is a module (`all_gather`, `all_to_all`, `ragged_all_to_all`, named as in the config) with the constants and
functions of `Transport`. `run_experts` runs inside `shard_map` (local view): lower-case letters are this device's part of a
dim. m tokens of this device, A experts of each token, e experts of this device, X devices of the axis `expert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

Name = Literal["all_gather", "all_to_all", "ragged_all_to_all"]
"""The transports, as `compute.transport` names them."""


class DropoutCounters(NamedTuple):
    """State of the counter-based random numbers of dropout."""

    key: jax.Array
    counters: jax.Array
    """One for each assignment, unique in the whole mesh: (m, A), or (R,) of rows."""


class Assignments(NamedTuple):
    """The tokens of this device and the experts that they go to."""

    x_mD: jax.Array
    expert_ids_mA: jax.Array
    """Among all E experts; E for an assignment that goes nowhere (padding, or dropped for lack of capacity)."""
    weights_mA: jax.Array
    dropout_mA: DropoutCounters | None


ApplyExperts = Callable[[jax.Array, jax.Array, Any, DropoutCounters | None], jax.Array]
"""(rows (R, D) in the order of their experts, rows of each expert (e,), unsharded weights, dropout of each row) -> (R, D)."""


@dataclass(frozen=True)
class LocalExperts:
    """The experts of this device."""

    weights: Any
    """Pytree of arrays (e, …), still sharded over `fsdp`."""
    unshard: Callable[[Any], Any]
    """Gathers `weights` over `fsdp` as `apply` takes them; its gradient is scattered back."""
    apply: ApplyExperts
    count: int
    """e."""


class ExchangeSizes(NamedTuple):
    """What one device exchanges with the others of its axis `expert` in one layer of a microbatch."""

    tokens: int
    """m."""
    model_dim: int
    experts_per_token: int
    devices: int
    """X."""
    itemsize: int = 2
    """Bytes of an element of a row."""
    peer_capacity: int | None = None
    """The most assignments that can go from one device to one other; None without a capacity factor."""

    @property
    def assignments(self) -> int:
        """m * A."""
        return self.tokens * self.experts_per_token


class Combined(NamedTuple):
    """The result of a transport on one device."""

    y_mD: jax.Array
    """For each token the weighted sum of its experts' outputs; zeros where it has none."""
    computed: jax.Array
    """Number of assignments actually computed (int32), so that callers can verify that none was lost."""


@runtime_checkable
class Transport(Protocol):
    """What each transport module provides."""

    @property
    def NAME(self) -> Name: ...

    @property
    def RECOMPUTES_EXPERTS(self) -> bool:
        """Whether the backward pass runs the experts again, whatever `compute.remat` says."""

    def run_experts(self, assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes, /) -> Combined:
        """Send each assignment to its expert, apply it, send the result back and combine; all-reduced over `tensor`."""

    def received(self, sizes: ExchangeSizes, /) -> Mapping[str, int]:
        """Bytes that a device receives from the others in one layer of a training step, by kind of collective.

        Counted are rows of `model_dim` while routing is balanced. They travel five ways whatever the rematerialization: to
        the experts and back, to the experts again for the backward pass, and the gradients both ways. Expert ids and
        weights are left out: 8 bytes beside the 2 * D of a row.
        """

    def rows_at_once(self, sizes: ExchangeSizes, /) -> int:
        """Rows that the experts of a device are applied to at once: the size of its buffers."""


def bytes_received(transport: Transport, sizes: ExchangeSizes) -> int:
    """Bytes that a device receives in one layer of a training step by all collectives of `transport`."""
    return sum(transport.received(sizes).values())
