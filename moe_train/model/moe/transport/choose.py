"""Which transport brings assignments to their experts: what each one moves along the mesh axis `expert`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from moe_train import config
from moe_train.machine.mesh import BATCH, platform
from moe_train.model.moe.capacity import capacity
from moe_train.model.moe.transport.all_to_all import slots_of


class AlongExpert(NamedTuple):
    """What one device has to bring to its experts in a layer of a microbatch."""

    tokens: int
    """m, of this device."""
    model_dim: int
    experts_per_token: int
    devices: int
    """X, of the mesh axis `expert`."""
    itemsize: int = 2
    most: int | None = None
    """Where a capacity is set: assignments of a device that can go to one other."""


def along_expert(run: config.Run, sizes: Mapping[str, int]) -> AlongExpert:
    """Of a run with experts; sizes: of the mesh's axes."""
    assert isinstance(run.model.ffn, config.MoeFfn)
    X, ffn = sizes["expert"], run.model.ffn
    T, cf = run.train.seq_len, run.train.capacity_factor
    rows = run.train.batch_size // (run.train.microbatches * math.prod(sizes[axis] for axis in BATCH))
    A, E, itemsize = ffn.experts_per_token, ffn.num_experts, jnp.dtype(run.compute.dtype).itemsize
    most = None if cf is None else rows * E // X * capacity(cf, T, A, E)
    return AlongExpert(rows * T // sizes["context"], run.model.model_dim, A, X, itemsize, most)


def transport_bytes(transport: str, along: AlongExpert) -> int:
    """Bytes that a device receives from the others of `expert` in one layer of a training step, while routing is balanced.

    Rows of model_dim go five ways, whatever the rematerialisation: out and back, out once more and the gradients both
    ways. With all_gather a way is (X - 1) * m rows; with all_to_all (X - 1) buffers of `slots_of`; with ragged_all_to_all
    the assignments that other devices hold, (X - 1) / X * m * A. What the routing itself needs (ids, weights) is left
    out: 8 bytes beside the 2 * D of a row.
    """
    tokens, model_dim, experts_per_token, devices, itemsize, most = along
    match transport:
        case "all_gather":
            rows = (devices - 1) * tokens
        case "all_to_all":
            rows = (devices - 1) * slots_of(tokens * experts_per_token, devices, most)
        case "ragged_all_to_all":
            rows = (devices - 1) * tokens * experts_per_token // devices
        case _:
            raise AssertionError(transport)
    return 5 * rows * model_dim * itemsize


def choose_transport(transport: str, along: AlongExpert, on: str | None = None) -> str:
    """`auto` -> the transport of the platform `on` (the mesh's in force) that moves the fewest bytes. `ragged` says where
    it is one of them, and why."""
    if transport != "auto":
        return transport
    names = ("all_gather", "all_to_all", *(("ragged_all_to_all",) if (on or platform()) == "tpu" else ()))
    return min(names, key=lambda name: transport_bytes(name, along))


def check_transport(transport: str) -> None:
    """Raise ValueError for one that the platform of the mesh in force has not."""
    if transport == "ragged_all_to_all" and platform() == "cpu":
        raise ValueError("compute.transport ragged_all_to_all: CPUs have no such collective; use all_to_all")


def transport_in_words(run: config.Run, sizes: Mapping[str, int]) -> str | None:
    """What moves assignments along `expert`, and what that costs; None where the axis has one device. sizes: of the mesh's
    axes."""
    if (name := transport_of(run, sizes)) is None:
        return None
    along = along_expert(run, sizes)
    costs = {other: transport_bytes(other, along) / 2**20 for other in (name, *{"all_gather", "all_to_all"} - {name})}
    (chosen, mib), *others = costs.items()
    than = ", ".join(f"{other} {cost:,.1f}" for other, cost in sorted(others))
    how = f", chosen by bytes on {platform()}" if run.compute.transport == "auto" else ""
    return f"{chosen} over {sizes['expert']} devices{how}: each receives {mib:,.1f} MiB in a layer of a microbatch ({than})"


def transport_of(run: config.Run, sizes: Mapping[str, int]) -> str | None:
    """The transport of a run; None where `expert` has one device."""
    if sizes["expert"] == 1:
        return None
    return choose_transport(run.compute.transport, along_expert(run, sizes))
