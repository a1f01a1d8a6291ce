"""The table of accelerators: peaks as their makers state them, and prices as of a date, which a user can replace.

Figures are peaks per chip. Sources, read in November 2026:
  TPU: https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e, …/tpu7x (key specifications; HBM, ICI and DCN bandwidth).
  GPU: the data sheets of A100 (80 GB, SXM4), H100 (SXM5, PCIe), H200 (SXM), HGX B200 and L40S on nvidia.com, without sparsity;
       network of a GPU: one 400 Gb/s adapter each in DGX H100, H200 and B200, 200 Gb/s in DGX A100 (DGX user guides).
HBM that programs get: v5e's as its compiler's errors say; v6e's by the same share, unconfirmed.
Prices in US dollars per chip and hour are for orientation; state your own: TPU on demand in US regions as commonly quoted in 2025,
not confirmed on https://cloud.google.com/tpu/pricing; GPU as effective rates of EC2 capacity blocks,
https://aws.amazon.com/ec2/capacityblocks/pricing (December 2024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator whose peak is known."""

    kinds: tuple[str, ...]
    """Words of jax's `device_kind`, in lower case, that name it; jax calls a v5p "TPU v5"."""
    flops: dict[str, float]
    """FLOP/s of matrix products by the dtype of their operands."""
    devices_per_chip: int = 1
    """Devices that JAX sees on a chip; each of them gets its share of it."""


@dataclass(frozen=True, kw_only=True)
class Device(Chip):
    """A chip with all that a plan needs."""

    hbm_bytes: int
    """On TPUs the size that the compiler lays programs out in, where that is known to be less than the chip has (v5e, v6e)."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s that a chip receives from its slice or host, over all its links."""
    torus_dims: int
    """Dims of the torus that the links form, with two of them in each dim; 0: a switch."""
    dcn_bandwidth: float
    """Bytes/s that a chip receives from other slices or hosts."""
    dollars_per_hour: float | None = None
    """None where no list price is known."""
    priced: str = ""
    """When the price was read."""


def _tpu(flops: float) -> dict[str, float]:
    """A matrix product of float32 operands takes 6 passes of bfloat16 where all bits count, one by default
    (jax.default_matmul_precision); the default counts here."""
    return {"bfloat16": flops, "float32": flops}


CHIPS: dict[str, Chip] = {
    "v5e": Device(
        kinds=("v5 lite", "v5e"),
        flops=_tpu(197e12),
        hbm_bytes=int(15.75 * GIB),
        hbm_bandwidth=819 * GB,
        link_bandwidth=200 * GB,
        torus_dims=2,
        dcn_bandwidth=25 / 8 * GB,
        dollars_per_hour=1.20,
        priced="2025, unconfirmed",
    ),
    "v5p": Device(
        kinds=("v5p", "v5"),
        flops=_tpu(459e12),
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765 * GB,
        link_bandwidth=600 * GB,
        torus_dims=3,
        dcn_bandwidth=50 / 8 * GB,
        dollars_per_hour=4.20,
        priced="2025, unconfirmed",
    ),
    "v6e": Device(
        kinds=("v6 lite", "v6e", "v6"),
        flops=_tpu(918e12),
        hbm_bytes=int(31.25 * GIB),
        hbm_bandwidth=1640 * GB,
        link_bandwidth=400 * GB,
        torus_dims=2,
        dcn_bandwidth=100 / 8 * GB,
        dollars_per_hour=2.70,
        priced="2025, unconfirmed",
    ),
    "tpu7x": Device(
        kinds=("tpu7x",),
        flops=_tpu(2307e12),
        devices_per_chip=2,
        hbm_bytes=192 * GIB,
        hbm_bandwidth=7380 * GB,
        link_bandwidth=600 * GB,
        torus_dims=3,
        dcn_bandwidth=100 / 8 * GB,
    ),
    "v4": Chip(kinds=("v4",), flops=_tpu(275e12)),
    "a100": Device(
        kinds=("a100",),
        flops={"bfloat16": 312e12, "float32": 156e12},
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=2039 * GB,
        link_bandwidth=300 * GB,
        torus_dims=0,
        dcn_bandwidth=25 * GB,
    ),
    "h100 pcie": Chip(kinds=("h100 pcie",), flops={"bfloat16": 756e12}),
    "h100": Device(
        kinds=("h100",),
        flops={"bfloat16": 989e12, "float32": 494e12},
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=3350 * GB,
        link_bandwidth=450 * GB,
        torus_dims=0,
        dcn_bandwidth=50 * GB,
        dollars_per_hour=4.92,
        priced="December 2024",
    ),
    "h200": Device(
        kinds=("h200",),
        flops={"bfloat16": 989e12, "float32": 494e12},
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4800 * GB,
        link_bandwidth=450 * GB,
        torus_dims=0,
        dcn_bandwidth=50 * GB,
        dollars_per_hour=5.41,
        priced="December 2024",
    ),
    "b200": Device(
        kinds=("b200",),
        flops={"bfloat16": 2250e12, "float32": 1100e12},
        hbm_bytes=180 * 10**9,
        hbm_bandwidth=8000 * GB,
        link_bandwidth=900 * GB,
        torus_dims=0,
        dcn_bandwidth=50 * GB,
    ),
    "l40s": Chip(kinds=("l40s",), flops={"bfloat16": 362e12}),
}
"""The one table of accelerators. A device_kind belongs to the first row that names it: "v5 lite" before "v5"."""

DEVICES = {name: chip for name, chip in CHIPS.items() if isinstance(chip, Device)}
"""The rows that plans can be made for."""


def chip_name(device: jax.Device) -> str | None:
    """The row of `CHIPS` that a device of JAX belongs to; None for one that is not in the table."""
    words = device.device_kind.lower()
    return next((name for name, chip in CHIPS.items() if any(kind in words for kind in chip.kinds)), None)


def peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """(FLOP/s that all `devices` could reach, where the figure is from).

    For accelerators the bfloat16 figure of `CHIPS`; for CPUs a float32 product measured here, once for each process, since
    the devices of a process share its cores. (None, why) for a chip that is not in the table.
    """
    device = devices[0]
    if device.platform == "cpu":
        processes = len({d.process_index for d in devices})
        return processes * measured_matmul_flops(), "a float32 product of 1024^3, measured"
    name = chip_name(device)
    if name is None:
        return None, f"no figure for {device.device_kind}"
    flops = CHIPS[name].flops["bfloat16"] / CHIPS[name].devices_per_chip
    return len(devices) * flops, f"{len(devices)} x {flops / 1e12:g} TFLOP/s (bfloat16, {device.device_kind})"


def measured_matmul_flops(size: int = 1024) -> float:
    """FLOP/s of the best of three float32 products on the first device of this process."""
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.asarray(np.ones((size, size), np.float32))
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(x, x))
        best = math.inf
        for _ in range(3):
            begun = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
