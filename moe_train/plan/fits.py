"""Check that a run fits into the memory of the devices that are present, before anything is allocated."""

from __future__ import annotations

import jax

from moe_train import config
from moe_train.machine.devices import DEVICES, GIB, chip_name
from moe_train.plan.describe import PART_NAMES, changed_settings
from moe_train.plan.memory import Memory, memory
from moe_train.plan.nearest import nearest_that_fits
from moe_train.plan.topology import Platform, Topology
from moe_train.plan.weights import layout

MODEL_ERROR_FACTOR = 1.1
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
    needed = memory(run, layout(run), _platform(device))
    # The model is not exact, so only a clear excess is refused.
    if needed.total <= MODEL_ERROR_FACTOR * limit:
        return
    raise ValueError(
        f"this run needs about {needed.total / GIB:.2f} GiB on each device, which has {limit / GIB:.2f}: "
        f"{describe_largest_parts(needed)}; {_remedy(run, device, limit)}"
    )


def _platform(device: jax.Device) -> Platform:
    return "gpu" if device.platform == "gpu" else "tpu"


def bytes_limit(device: jax.Device) -> int | None:
    """Return the bytes that programs may use, as the device states; None on a CPU or if the device states none."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def describe_largest_parts(needed: Memory) -> str:
    """Describe the three largest parts of the memory in words."""
    largest = sorted(needed._asdict().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{PART_NAMES[name]} {size / GIB:.2f}" for name, size in largest)


def _remedy(run: config.Run, device: jax.Device, limit: int) -> str:
    """Return the settings that fit on the same number of devices of this kind and differ least from the run's."""
    kind = chip_name(device)
    if kind not in DEVICES:
        return "use more devices, compute.remat full or more train.microbatches"
    num_chips = jax.device_count() // DEVICES[kind].devices_per_chip
    topology = Topology(
        name=f"{jax.device_count()} x {kind}",
        platform=_platform(device),
        device=kind,
        # The slice's sides are unknown here; they decide only whether the torus of a small slice closes (`roofline._bandwidth`).
        shape=(num_chips,),
        num_slices=1,
    )
    nearest = nearest_that_fits(run, topology, limit)
    if nearest is None:
        return (
            f"no mesh of these {jax.device_count()} devices is large enough: use more devices (`moe-train plan` computes how many)"
        )
    settings = " ".join(f"{key}={value}" for key, value in changed_settings(run, nearest.run).items())
    return f"this fits: {settings}"
