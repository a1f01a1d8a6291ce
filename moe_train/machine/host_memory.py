"""A check that arrays fit into the host's memory, before any of them is allocated."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the memory limit of a container, in the two versions of Linux's control groups."""


def check_host_memory(arrays: Any, owner: str) -> None:
    """Raise ValueError if arrays need more memory on this process's devices than the host has available.

    Only hosts whose devices are CPUs are checked. On an accelerator an allocation fails with a message, while Linux would kill
    the process without one.

    Args:
        arrays: a pytree of shapes with specs of the mesh in force.
        owner: the run or model that the arrays belong to, for the message.

    Raises:
        ValueError: the arrays do not fit.
    """
    mesh = jax.sharding.get_mesh()
    available_bytes = available_memory()
    if available_bytes is None or mesh.local_devices[0].platform != "cpu":
        return
    bytes_per_device = 0
    for x in jax.tree.leaves(arrays):
        shape = x.shape
        # Each device holds a shard; what is replicated is held by every one of them.
        if x.sharding is not None:
            shape = NamedSharding(mesh, x.sharding.spec).shard_shape(x.shape)
        bytes_per_device += math.prod(shape) * x.dtype.itemsize
    needed_bytes = bytes_per_device * len(mesh.local_devices)
    if needed_bytes > available_bytes:
        raise ValueError(
            f"{owner} needs {needed_bytes / 2**30:.3g} GiB of memory for its weights and the state of the optimizer, "
            f"but this machine has {available_bytes / 2**30:.3g} GiB available; use a machine with more memory, or several "
            "(see `moe-train plan`), or quantize frozen weights (lora.quantize)"
        )


def available_memory() -> int | None:
    """Return the bytes that Linux can give programs without swapping, or the container's limit if that is lower.

    None if the available memory is not known, as on other systems.
    """
    try:
        stated = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # not Linux
        return None
    if stated is None:
        return None
    # A container's limit can be lower than what the host has available.
    limits = (Path(file).read_text(encoding="ascii").strip() for file in LIMITS if Path(file).is_file())
    # Control groups state "no limit" as the word max (version 2) or as a number near 2^63 (version 1).
    return min(int(stated[1]) * 1024, *(int(limit) for limit in limits if limit.isdigit()), 2**62)
