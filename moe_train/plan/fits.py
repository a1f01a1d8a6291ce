"""Check that a run fits into the memory of the devices that are present, before anything is allocated."""

from __future__ import annotations

import jax

from moe_train import config
from moe_train.machine.devices import DEVICES, GIB, chip_name
from moe_train.plan import search
from moe_train.plan.memory import Memory, memory
from moe_train.plan.topology import Topology
from moe_train.plan.weights import layout

ERROR = 1.1
"""Tolerance for the error of the memory model against the compiler: a run is refused only if it exceeds the device's memory by
more than this factor.
"""


def check_fits(run: config.Run, device: jax.Device) -> None:
    """Raise ValueError if the step of a resolved `run` needs more memory than `device` has.

    The message states the numbers and the nearest choice that fits. A CPU is never refused, having no memory of its own to
    exceed, and neither is a device that does not state its limit.
    """
    limit = bytes_limit(device)
    if limit is None:
        return
    needed = memory(run, layout(run))
    # The model is not exact, so only a clear excess is refused.
    if needed.total <= ERROR * limit:
        return
    raise ValueError(
        f"this run needs about {needed.total / GIB:.2f} GiB on each device, which has {limit / GIB:.2f}: {parts(needed)}; "
        f"{_remedy(run, device, limit)}"
    )


def bytes_limit(device: jax.Device) -> int | None:
    """Return the bytes that programs may use, as the device states; None on a CPU or if the device states none."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def parts(needed: Memory) -> str:
    """Describe the three largest parts of the memory in words."""
    largest = sorted(needed._asdict().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{search.NAMES[name]} {size / GIB:.2f}" for name, size in largest)


def _remedy(run: config.Run, device: jax.Device, limit: int) -> str:
    """Return the settings that fit on the same number of devices of this kind and differ least from the run's."""
    kind = chip_name(device)
    if kind not in DEVICES:
        return "use more devices, compute.remat full or more train.microbatches"
    topology = Topology(
        f"{jax.device_count()} x {kind}", "gpu" if device.platform == "gpu" else "tpu", kind, (jax.device_count(),), 1
    )
    if topology.devices_per_chip > 1:
        topology = Topology(topology.name, topology.platform, kind, (jax.device_count() // topology.devices_per_chip,), 1)
    nearest = search.nearest_that_fits(run, topology, limit)
    if nearest is None:
        return f"no mesh of the {jax.device_count()} devices here fits it: use more of them (`moe-train plan` says how many)"
    return "this fits: " + " ".join(f"{key}={value}" for key, value in search.changed(run, nearest.run).items())
