"""Table of accelerators: peak figures from the manufacturers, and dated prices, which a user can replace.

Figures are peaks per chip. Sources, read in November 2026:
  TPU: https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e, …/tpu7x (key specifications; HBM, ICI and DCN bandwidth).
  GPU: the data sheets of A100 (80 GB, SXM4), H100 (SXM5, PCIe), H200 (SXM) and HGX B200 on nvidia.com; all without sparsity.
       L40S and L40: NVIDIA's table as reprinted at https://www.mullet.se/product.html?product_id=355414 (BFLOAT16 362.05 and
       181.05, TF32 183 TFLOP/s, 864 GB/s). L4: https://aiwiki.ai/wiki/nvidia_l4 and NVIDIA's table as reprinted by
       https://store.sourcecode.com (with sparsity FP16 242, TF32 120 TFLOP/s: half of each; 300 GB/s). RTX 4090:
       https://waredb.com/processor/nvidia-geforce-rtx-4090 (BF16 165.15, TF32 82.58 TFLOP/s, 1008 GB/s). MI300X:
       https://github.com/alpharomercoma/MI300X-vs-H200 (REPORT.md: BF16 1307.4 TFLOP/s, 5.3 TB/s, 192 GB) and
       https://www.emergentmind.com/topics/amd-mi300x-gpu (links of 64 GB/s each way to seven others, 448 GB/s).
       All without NVLink receive by PCIe 4.0 x16, 32 GB/s (64 GB/s both ways).
       Network of a GPU: one 400 Gb/s adapter each in DGX H100, H200 and B200, 200 Gb/s in DGX A100 (DGX user guides), and 400 Gb/s
       with an MI300X; 200 Gb/s with an L40S and 100 Gb/s with an L4 or RTX 4090 are assumed.
HBM that programs can use: for v5e from its compiler's error messages; for v6e the same fraction, unconfirmed.
Prices in US dollars per chip and hour are for orientation; state your own. TPU: on demand in US regions, as commonly quoted in
2025, not confirmed on https://cloud.google.com/tpu/pricing. GPU: effective rates of EC2 capacity blocks,
https://aws.amazon.com/ec2/capacityblocks/pricing (December 2024).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

GB = 1e9
"""Bytes of a decimal gigabyte, as data sheets state bandwidth."""
GIB = 2**30
"""Bytes of a gibibyte."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator with a known peak."""

    kinds: tuple[str, ...]
    """Lower-case substrings of JAX's `device_kind` that identify the chip; JAX calls a v5p "TPU v5"."""
    flops: dict[str, float]
    """Peak FLOP/s of matrix products, by the dtype of their operands."""
    devices_per_chip: int = 1
    """Number of devices that JAX sees on a chip; each gets an equal share of it."""


@dataclass(frozen=True, kw_only=True)
class Device(Chip):
    """A chip with all figures that a plan needs."""

    hbm_bytes: int
    """HBM size. For TPUs where it is known to be less than the chip has (v5e, v6e), the size that the compiler can use."""
    hbm_bandwidth: float
    """HBM bandwidth in bytes/s."""
    link_bandwidth: float
    """Bytes/s that a chip receives from its slice or host, over all its links."""
    torus_dims: int
    """Dims of the torus that the links form, with two links per dim; 0 for a switch."""
    dcn_bandwidth: float
    """Bytes/s that a chip receives from other slices or hosts."""
    dollars_per_hour: float | None = None
    """List price per chip; None if none is known."""
    priced: str = ""
    """When the price was read."""


def _tpu(flops: float) -> dict[str, float]:
    """Return the peak FLOP/s of a TPU by dtype; float32 counts as bfloat16.

    A product of float32 operands takes six bfloat16 passes at full precision and one by default
    (jax.default_matmul_precision); the table uses the default.
    """
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
    "l40s": Device(
        kinds=("l40s",),
        flops={"bfloat16": 362e12, "float32": 183e12},
        hbm_bytes=48 * 10**9,
        hbm_bandwidth=864 * GB,
        link_bandwidth=32 * GB,
        torus_dims=0,
        dcn_bandwidth=25 * GB,
    ),
    "l40": Chip(kinds=("l40",), flops={"bfloat16": 181e12}),
    "l4": Device(
        kinds=("l4",),
        flops={"bfloat16": 121e12, "float32": 60e12},
        hbm_bytes=24 * 10**9,
        hbm_bandwidth=300 * GB,
        link_bandwidth=32 * GB,
        torus_dims=0,
        dcn_bandwidth=12.5 * GB,
    ),
    "rtx4090": Device(
        kinds=("rtx 4090",),
        flops={"bfloat16": 165e12, "float32": 82.6e12},
        hbm_bytes=24 * 10**9,
        hbm_bandwidth=1008 * GB,
        link_bandwidth=32 * GB,
        torus_dims=0,
        dcn_bandwidth=12.5 * GB,
    ),
    "mi300x": Device(
        kinds=("mi300x",),
        flops={"bfloat16": 1307e12, "float32": 654e12},
        hbm_bytes=192 * 10**9,
        hbm_bandwidth=5300 * GB,
        link_bandwidth=448 * GB,
        torus_dims=0,
        dcn_bandwidth=50 * GB,
    ),
}
"""All known accelerators. A device_kind belongs to the first row that matches it, so "v5 lite" stands before "v5"."""

DEVICES = {name: chip for name, chip in CHIPS.items() if isinstance(chip, Device)}
"""The rows that plans can be made for."""


def chip_name(device: jax.Device) -> str | None:
    """Return the row of `CHIPS` that a JAX device belongs to; None if it is not in the table."""
    words = device.device_kind.lower()
    return next((name for name, chip in CHIPS.items() if any(kind in words for kind in chip.kinds)), None)


def peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """Return (the peak FLOP/s of all `devices` together, the source of the figure).

    For accelerators it is the bfloat16 figure of `CHIPS`. For CPUs it is the speed of a float32 product measured here, counted
    once per process, since the devices of a process share its cores. For a chip that is not in the table the result is
    (None, the reason).
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


@functools.cache
def measured_matmul_flops(size: int = 1024) -> float:
    """Measure the FLOP/s of the best of three float32 products of `size` x `size` on the first device, once per process."""
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.asarray(np.ones((size, size), np.float32))
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(x, x))
        # The call above has compiled the product.
        best_seconds = math.inf
        for _ in range(3):
            start_time = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best_seconds = min(best_seconds, time.perf_counter() - start_time)
    return 2 * size**3 / best_seconds
