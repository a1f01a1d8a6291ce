"""Whether arrays fit into the host's memory, checked before any of them is allocated."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""The memory limit of a container, in the two versions of Linux's control groups."""


def check_host_memory(arrays: Any, whose: str) -> None:
    """Raise ValueError where arrays need more memory on this process's devices than the host has available.

    The memory of an accelerator is not checked: there an allocation fails with a message, where Linux would kill the process
    without one.

    Args:
        arrays: a pytree of shapes with specs of the mesh in force.
        whose: what the arrays belong to, for the message.
    """
    mesh = jax.sharding.get_mesh()
    here = available()
    if here is None or mesh.local_devices[0].platform != "cpu":
        return
    on_a_device = 0
    for x in jax.tree.leaves(arrays):
        shape = x.shape if x.sharding is None else NamedSharding(mesh, x.sharding.spec).shard_shape(x.shape)
        on_a_device += math.prod(shape) * x.dtype.itemsize
    if (needed := on_a_device * len(mesh.local_devices)) > here:
        raise ValueError(
            f"{whose} needs {needed / 2**30:.3g} GiB of memory for its weights and what is kept beside them, and this machine has "
            f"{here / 2**30:.3g} GiB available; use a machine with more, or several (`moe-train plan` counts them), or hold "
            "what is frozen in fewer bits (lora.quantize)"
        )


def available() -> int | None:
    """Bytes that Linux can give programs without swapping, or the limit of a container; None where neither is known."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # no Linux
        return None
    if found is None:
        return None
    limits = (Path(file).read_text(encoding="ascii").strip() for file in LIMITS if Path(file).is_file())
    return min(int(found[1]) * 1024, *(int(limit) for limit in limits if limit.isdigit()), 2**62)
