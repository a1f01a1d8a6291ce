"""Whether arrays find room in the host's memory, before any of them is made."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of a container, as either version of Linux's control groups has it."""


def require_room(arrays: Any, whose: str) -> None:
    """Raise ValueError where arrays, a pytree of shapes with specs of the mesh in force, need more memory on this process's
    devices than the host has available. An accelerator's own memory is not looked at: it is refused with a message, where
    Linux would end the process without a word."""
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
    """Bytes that Linux would give programs without swapping, or a container's limit; None where it is not said."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # no Linux
        return None
    if found is None:
        return None
    limits = (Path(file).read_text(encoding="ascii").strip() for file in LIMITS if Path(file).is_file())
    return min(int(found[1]) * 1024, *(int(limit) for limit in limits if limit.isdigit()), 2**62)
