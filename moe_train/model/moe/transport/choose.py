"""Selection of a layer's transport: as configured, or with `auto` the one that moves the fewest bytes along the axis `expert`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, assert_never

import jax.numpy as jnp

from moe_train import config
from moe_train.machine.mesh import BATCH, platform
from moe_train.model.moe.capacity import capacity
from moe_train.model.moe.transport import all_gather, all_to_all, ragged_all_to_all
from moe_train.model.moe.transport.transport import ExchangeSizes, Transport, TransportName, bytes_received


def choose_transport(setting: TransportName | Literal["auto"], sizes: ExchangeSizes, on: str | None = None) -> Transport:
    """Return the transport module for a value of `compute.transport`.

    Args:
        setting: name of a transport, or `auto`.
        sizes: what a device exchanges in one layer of a microbatch.
        on: platform that `auto` chooses for; None for the platform of the mesh in force.
    """
    match setting:
        case "auto":
            candidates = [choose_transport(name, sizes) for name in transports_of(on or platform())]
            return min(candidates, key=lambda transport: bytes_received(transport, sizes))
        case "all_gather":
            return all_gather
        case "all_to_all":
            return all_to_all
        case "ragged_all_to_all":
            return ragged_all_to_all
    assert_never(setting)


def transports_of(on: str) -> tuple[TransportName, ...]:
    """Return the names of the transports that `auto` chooses from on a platform; among equal ones it takes the first.

    ragged_all_to_all is not implemented on CPUs and not measured on GPUs.
    """
    return ("all_gather", "all_to_all", "ragged_all_to_all") if on == "tpu" else ("all_gather", "all_to_all")


def check_transport(setting: str) -> None:
    """Raise ValueError for a transport that the platform of the mesh in force does not implement."""
    if setting == "ragged_all_to_all" and platform() == "cpu":
        raise ValueError("compute.transport ragged_all_to_all: CPUs have no such collective; use all_to_all")


def exchange_sizes(run: config.Run, mesh_sizes: Mapping[str, int]) -> ExchangeSizes:
    """Return what a device exchanges in each layer of a run with experts, on a mesh with axes of these sizes."""
    assert isinstance(run.model.ffn, config.MoeFfn)
    ffn = run.model.ffn
    T = run.train.seq_len
    capacity_factor = run.train.capacity_factor
    rows = run.train.batch_size // (run.train.microbatches * math.prod(mesh_sizes[axis] for axis in BATCH))
    peer_capacity = None
    if capacity_factor is not None:
        # As `experts._local_assignments` computes it: all rows of a device may fill all experts of a peer.
        per_expert = rows * capacity(capacity_factor, T, ffn.experts_per_token, ffn.num_experts)
        peer_capacity = ffn.num_experts // mesh_sizes["expert"] * per_expert
    return ExchangeSizes(
        tokens=rows * T // mesh_sizes["context"],
        model_dim=run.model.model_dim,
        experts_per_token=ffn.experts_per_token,
        devices=mesh_sizes["expert"],
        itemsize=jnp.dtype(run.compute.dtype).itemsize,
        peer_capacity=peer_capacity,
    )


def transport_of(run: config.Run, mesh_sizes: Mapping[str, int]) -> TransportName | None:
    """Return the name of a run's transport; None if the axis `expert` has one device."""
    if mesh_sizes["expert"] == 1:
        return None
    return choose_transport(run.compute.transport, exchange_sizes(run, mesh_sizes)).NAME


def describe_transport(run: config.Run, mesh_sizes: Mapping[str, int]) -> str | None:
    """Describe in one line the transport of a run and the bytes that it and the others move.

    None if the axis `expert` has one device.
    """
    chosen = transport_of(run, mesh_sizes)
    if chosen is None:
        return None
    sizes = exchange_sizes(run, mesh_sizes)
    mib = {name: _mib(name, sizes) for name in {chosen, "all_gather", "all_to_all"}}
    others = ", ".join(f"{name} {mib[name]:,.1f}" for name in sorted(mib) if name != chosen)
    reason = f", chosen by bytes on {platform()}" if run.compute.transport == "auto" else ""
    return (
        f"{chosen} over {mesh_sizes['expert']} devices{reason}: each receives {mib[chosen]:,.1f} MiB "
        f"in a layer of a microbatch ({others})"
    )


def _mib(name: TransportName, sizes: ExchangeSizes) -> float:
    return bytes_received(choose_transport(name, sizes), sizes) / 2**20
