"""Check that a run fits into the memory of the devices here, before anything is allocated."""

from __future__ import annotations

import jax

from moe_train import config
from moe_train.machine.devices import DEVICES, GIB, chip_name
from moe_train.plan import search
from moe_train.plan.memory import Memory, memory
from moe_train.plan.topology import Topology
from moe_train.plan.weights import layout

ERROR = 1.1
"""A run is refused where it exceeds the device by more than the error of the memory model against the compiler."""


def check_fits(run: config.Run, device: jax.Device) -> None:
    """Raise ValueError, with the numbers and the nearest choice that fits, where the step of a resolved `run` needs more
    memory than `device` has. A CPU has no memory of its own to exceed, and one that does not tell its limit is trusted."""
    limit = bytes_limit(device)
    if limit is None:
        return
    needed = memory(run, layout(run))
    if needed.total <= ERROR * limit:
        return
    raise ValueError(
        f"this run needs about {needed.total / GIB:.2f} GiB on each device, which has {limit / GIB:.2f}: {parts(needed)}; "
        f"{_remedy(run, device, limit)}"
    )


def bytes_limit(device: jax.Device) -> int | None:
    """Bytes that programs may use, as the device states; None on CPU, and where it states none."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def parts(needed: Memory) -> str:
    """The three largest parts, in words."""
    largest = sorted(needed._asdict().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{search.NAMES[name]} {size / GIB:.2f}" for name, size in largest)


def _remedy(run: config.Run, device: jax.Device, limit: int) -> str:
    """The settings that fit on as many devices of this kind and change least of the run."""
    kind = chip_name(device)
    if kind not in DEVICES:
        return "use more devices, compute.remat full or more train.microbatches"
    here = Topology(f"{jax.device_count()} x {kind}", "gpu" if device.platform == "gpu" else "tpu", kind, (jax.device_count(),), 1)
    if here.devices_per_chip > 1:
        here = Topology(here.name, here.platform, kind, (jax.device_count() // here.devices_per_chip,), 1)
    nearest = search.nearest_that_fits(run, here, limit)
    if nearest is None:
        return f"no mesh of the {jax.device_count()} devices here fits it: use more of them (`moe-train plan` says how many)"
    return "this fits: " + " ".join(f"{key}={value}" for key, value in search.changed(run, nearest.run).items())
