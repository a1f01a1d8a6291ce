"""The transport protocol: how tokens reach the devices of their experts, and how the results come back.

A transport is a module (`all_gather`, `all_to_all`, `ragged_all_to_all`, named as in the config) with the constants and
functions of `Transport`. `run_experts` runs inside `shard_map` (local view): lower-case letters are this device's part of a
dim. m tokens of this device, A experts of each token, e experts of this device, X devices of the axis `expert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, UInt32

TransportName = Literal["all_gather", "all_to_all", "ragged_all_to_all"]
"""Names of the transports, as in `compute.transport`."""


class DropoutCounters(NamedTuple):
    """State of the counter-based random number generator for dropout."""

    key: Key[Array, ""]
    counters: UInt32[Array, "..."]
    """Counters, unique in the whole mesh: one per token (B, T), one per assignment (m, A), or one per row (R,)."""


class Assignments(NamedTuple):
    """The tokens of this device, and the experts and weights that the router chose for them."""

    x_mD: Float[Array, "m D"]
    expert_ids_mA: Int[Array, "m A"]
    """Ids among all E experts; E for an assignment that is sent nowhere (padding, or dropped for lack of capacity)."""
    weights_mA: Float[Array, "m A"]
    dropout_mA: DropoutCounters | None


ApplyExperts = Callable[[Float[Array, "R D"], Int[Array, " e"], Any, DropoutCounters | None], Float[Array, "R D"]]
"""(rows (R, D) in the order of their experts, rows of each expert (e,), unsharded weights, dropout of each row) -> (R, D)."""


@dataclass(frozen=True)
class LocalExperts:
    """The experts of this device."""

    weights: Any
    """Pytree of arrays (e, …), still sharded over `fsdp`."""
    unshard: Callable[[Any], Any]
    """Gathers `weights` over `fsdp`, in the form that `apply` takes; the gradient is scattered back."""
    apply: ApplyExperts
    count: int
    """Number of experts on this device, e."""


class ExchangeSizes(NamedTuple):
    """Sizes of what one device exchanges with the others of its axis `expert` in one layer of a microbatch."""

    tokens: int
    """Tokens of this device, m."""
    model_dim: int
    experts_per_token: int
    devices: int
    """Devices of the axis `expert`, X."""
    itemsize: int = 2
    """Bytes of an element of a row."""
    peer_capacity: int | None = None
    """The largest number of assignments from one device to one other; None without a capacity factor."""

    @property
    def assignments(self) -> int:
        """Assignments of this device, m * A."""
        return self.tokens * self.experts_per_token


class Combined(NamedTuple):
    """The result of a transport on one device."""

    y_mD: Float[Array, "m D"]
    """Weighted sum of the expert outputs of each token; zeros for a token without experts."""
    computed: Int[Array, ""]
    """Number of assignments actually computed (int32), so that callers can verify that none was lost."""


@runtime_checkable
class Transport(Protocol):
    """Protocol that each transport module implements."""

    @property
    def NAME(self) -> TransportName:
        """Name of the transport, as in the config."""
        ...

    @property
    def RECOMPUTES_EXPERTS(self) -> bool:
        """Whether the backward pass runs the experts again, whatever `compute.remat` says."""

    def run_experts(self, assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes, /) -> Combined:
        """Send each assignment to its expert, apply it, send the result back and combine; all-reduced over `tensor`."""

    def received(self, sizes: ExchangeSizes, /) -> Mapping[str, int]:
        """Return the bytes that a device receives from the others in one layer of a training step, by kind of collective.

        Only rows of `model_dim` under balanced routing are counted. They are exchanged five times, whatever the rematerialization:
        to the experts and back, to the experts again for the backward pass, and the gradients both ways. Expert ids and weights are
        left out: they add 8 bytes to the 2 * D of a row.
        """

    def rows_at_once(self, sizes: ExchangeSizes, /) -> int:
        """Return the number of rows that the experts of a device are applied to at once: the size of its buffers."""


def bytes_received(transport: Transport, sizes: ExchangeSizes) -> int:
    """Return the bytes that a device receives in one layer of a training step through all collectives of `transport`."""
    return sum(transport.received(sizes).values())
