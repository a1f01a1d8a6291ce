"""Parse names of hardware that need not be present into the number of chips and how they are connected.

    v5p:4x4x4      one slice, by its shape in chips; v5e:4x4, v6e:8x8, tpu7x:2x2x2
    v5p-64         the same by its cloud name: v5p and tpu7x count TensorCores, two per chip, so this has 32 chips;
                   v5litepod-16 (or v5e-16) and v6e-16 count chips
    h100x8         one host with 8 GPUs; l40sx8, mi300xx8 (or mi300x8), rtx4090x2 (or 4090x2)
    2xv5p:4x4x4    two slices, 4xh100x8 four hosts (also 2*v5p:4x4x4, which shells need quoted)

Shapes of slices: https://cloud.google.com/tpu/docs/v5p, …/v5e, …/v6e, …/tpu7x ("Configurations").
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from moe_train.machine.devices import DEVICES

Platform = Literal["tpu", "gpu"]
"""Platforms that a step can be planned for."""


@dataclass(frozen=True)
class Topology:
    """`num_slices` groups of chips of equal `shape`, connected by the data-center network."""

    name: str
    """A name that `parse_topology` reads, with the shape instead of a cloud name: v5p:4x4x4, 2xv5p:4x4x4, h100x8."""
    platform: Platform
    device: str
    """The key of its row in `devices.DEVICES`."""
    shape: tuple[int, ...]
    """Chips of a TPU slice along its axes, or (number of GPUs,) of a host."""
    num_slices: int

    @property
    def slice_name(self) -> str:
        """The name of one slice or host."""
        return _name(self.device, self.shape)

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice, or GPUs of one host."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.num_slices * self.chips_per_slice

    @property
    def devices_per_chip(self) -> int:
        """Devices that JAX sees on a chip."""
        return DEVICES[self.device].devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        """Devices that JAX sees on a slice or host."""
        return self.chips_per_slice * self.devices_per_chip

    @property
    def num_devices(self) -> int:
        """Devices that JAX sees in total, over which a mesh is laid."""
        return self.num_chips * self.devices_per_chip


SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Shapes of v5e and v6e slices."""
SMALL_3D_SLICES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices smaller than 64 chips; larger ones are built from cubes of 4x4x4."""
LARGEST_3D_SLICES = {"v5p": (16, 16, 24), "tpu7x": (16, 16, 36)}
"""The longest sides of a slice of devices connected as a 3D torus."""
MAX_CHIPS = 2**20
"""The largest topology that is accepted; its meshes are still ranked within seconds."""
GPU_DEVICES = ("a100", "h100", "h200", "b200", "l4", "l40s", "rtx4090", "mi300x")
"""GPUs whose topologies have names."""
GPUS_PER_HOST = (1, 2, 4, 8)
"""Numbers of GPUs that a host may have."""
CLOUD_NAMES = {"v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1)}
"""First word of a cloud name -> (device, how many of the units that the name counts are on a chip)."""
EXAMPLE_NAMES = "v5p:4x4x4, v5e:4x4, v6e:8x8, tpu7x:2x2x2, v5p-64, v5litepod-16, 2xv5p:4x4x4, h100x8, 4xh100x8"


def parse_topology(name: str) -> Topology:
    """Parse the name of a topology.

    Raises:
        ValueError: no such hardware exists; the message names the nearest that does.
    """
    count = 1
    slice_name = name.lower()
    # A letter has to follow the x, as in 2xv5p, since digits would be sides of a shape.
    several_slices = re.fullmatch(r"(\d+)[x*](?=[a-z])(.+)", slice_name)
    if several_slices:
        count = int(several_slices[1])
        slice_name = several_slices[2]
    if count < 1:
        raise ValueError(f"topology {name} has {count} slices; use at least 1")
    device, shape = _slice(slice_name)
    platform: Platform = "gpu" if device in GPU_DEVICES else "tpu"
    canonical_name = _name(device, shape)
    topology = Topology(canonical_name if count == 1 else f"{count}x{canonical_name}", platform, device, shape, count)
    if topology.num_chips > MAX_CHIPS:
        raise ValueError(f"topology {name} has {topology.num_chips:,} chips; the limit is {MAX_CHIPS:,}; plan for fewer slices")
    return topology


def _slice(name: str) -> tuple[str, tuple[int, ...]]:
    """Parse the name of one slice or host into its device and shape."""
    by_shape = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if by_shape:
        device = by_shape[1]
        shape = tuple(int(side) for side in by_shape[2].split("x"))
        if device in GPU_DEVICES:
            raise _missing_host(name, device, math.prod(shape))
        _check_known(device, ("v5p", "v5e", "v6e", "tpu7x"), name)
        if shape not in slice_shapes(device):
            raise _missing_slice(name, device, math.prod(shape), "chips")
        return device, shape
    by_gpus = re.fullmatch(r"([a-z]*\d+[a-z]?)x(\d+)", name)
    if by_gpus:
        # The name of an MI300X ends in an x itself, which is easily left out, as the first letters of an RTX 4090 are.
        spellings = (f"{by_gpus[1]}x", f"rtx{by_gpus[1]}")
        device = next((spelling for spelling in spellings if spelling in GPU_DEVICES), by_gpus[1])
        count = int(by_gpus[2])
        _check_known(device, GPU_DEVICES, name)
        if count not in GPUS_PER_HOST:
            raise _missing_host(name, device, count)
        return device, (count,)
    by_cloud_name = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    if by_cloud_name:
        cloud_name = by_cloud_name[1]
        number = int(by_cloud_name[2])
        _check_known(cloud_name, CLOUD_NAMES, name)
        device, per_chip = CLOUD_NAMES[cloud_name]
        matching_shapes = [shape for shape in slice_shapes(device) if math.prod(shape) * per_chip == number]
        if not matching_shapes:
            counted = f" ({number} TensorCores, {per_chip} to a chip)" if per_chip > 1 else ""
            raise _missing_slice(name, device, number / per_chip, f"chips{counted}")
        return device, min(matching_shapes, key=sum)  # among several shapes, the one closest to a cube
    raise ValueError(f"topology {name!r} is not the name of a topology; examples: {EXAMPLE_NAMES}")


def slice_shapes(device: str) -> Iterator[tuple[int, ...]]:
    """Iterate over the shapes, in chips, of all slices that are offered for a TPU."""
    if device not in LARGEST_3D_SLICES:
        return iter(SLICES_2D)
    # Larger slices consist of cubes of 4 x 4 x 4; their sides are stated in ascending order.
    sides = [range(4, largest + 1, 4) for largest in LARGEST_3D_SLICES[device]]
    return itertools.chain(SMALL_3D_SLICES, (s for s in itertools.product(*sides) if s == tuple(sorted(s))))


def _name(device: str, shape: tuple[int, ...]) -> str:
    """Return the name of one slice or host, as `parse_topology` reads it."""
    if device in GPU_DEVICES:
        return f"{device}x{shape[0]}"
    return f"{device}:{'x'.join(map(str, shape))}"


def _check_known(word: str, words: Collection[str], name: str) -> None:
    if word not in words:
        nearest = difflib.get_close_matches(word, words, 1, 0.0)
        raise ValueError(f"topology {name}: there is no {word}; nearest: {nearest[0]} (known: {', '.join(words)})")


def _missing_slice(name: str, device: str, chips: float, unit: str) -> ValueError:
    """Return the error for a slice that does not exist.

    Args:
        name: the name as the user wrote it.
        device: the TPU.
        chips: the number of chips that was asked for.
        unit: what the message calls that number, such as chips.
    """
    # Closest by ratio of sizes, then the shape closest to a cube.
    nearest = min(slice_shapes(device), key=lambda s: (abs(math.log(math.prod(s) / max(chips, 0.5))), sum(s)))
    return ValueError(
        f"topology {name} does not exist: {chips:g} {unit}; nearest: {_name(device, nearest)}, {math.prod(nearest)} chips"
    )


def _missing_host(name: str, device: str, count: int) -> ValueError:
    nearest = min(GPUS_PER_HOST, key=lambda size: abs(size - count))
    hosts = ""
    if count > 8 and count % 8 == 0:
        hosts = f"; several hosts are {count // 8}x{device}x8"
    return ValueError(f"topology {name}: a host has 1, 2, 4 or 8 GPUs, without a shape; nearest: {device}x{nearest}{hosts}")
