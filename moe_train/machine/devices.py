"""What each accelerator can do, as its maker says; and what it costs, as of a date, until the user says otherwise.

Figures are peaks per chip. Sources, read in November 2026:
  TPU: https://cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e, …/tpu7x (key specifications; HBM, ICI and DCN bandwidth).
  GPU: the data sheets of A100 (80 GB, SXM4), H100 (SXM5), H200 (SXM) and HGX B200 on nvidia.com, without sparsity;
       network of a GPU: one 400 Gb/s adapter each in DGX H100, H200 and B200, 200 Gb/s in DGX A100 (DGX user guides).
HBM that programs get: v5e's as its compiler's errors say; v6e's by the same share, unconfirmed.
Prices in US dollars per chip and hour are orientation, state your own: TPU on demand in US regions as commonly quoted in 2025,
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


@dataclass(frozen=True)
class Device:
    """One chip."""

    flops: dict[str, float]
    """FLOP/s of matrix products by the dtype of their operands."""
    hbm_bytes: int
    """Of a TPU what its compiler lays programs out in, where that is known to be less than the chip has (v5e, v6e)."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s that a chip receives from its slice or host, over all its links."""
    torus_dims: int
    """Dims of the torus that the links form, with two of them in each dim; 0: a switch."""
    dcn_bandwidth: float
    """Bytes/s that a chip receives from other slices or hosts."""
    dollars_per_hour: float | None
    """None where no list price is known."""
    priced: str
    devices_per_chip: int = 1
    """To JAX; each of them gets its share of the chip."""


DEVICES = {
    # A matrix product of float32 operands takes 6 passes of bfloat16 where all bits count, one by default
    # (jax.default_matmul_precision); the default counts here.
    "v5e": Device(
        {"bfloat16": 197e12, "float32": 197e12}, int(15.75 * GIB), 819 * GB, 200 * GB, 2, 25 / 8 * GB, 1.20, "2025, unconfirmed"
    ),
    "v5p": Device(
        {"bfloat16": 459e12, "float32": 459e12}, 95 * GIB, 2765 * GB, 600 * GB, 3, 50 / 8 * GB, 4.20, "2025, unconfirmed"
    ),
    "v6e": Device(
        {"bfloat16": 918e12, "float32": 918e12}, int(31.25 * GIB), 1640 * GB, 400 * GB, 2, 100 / 8 * GB, 2.70, "2025, unconfirmed"
    ),
    "tpu7x": Device({"bfloat16": 2307e12, "float32": 2307e12}, 192 * GIB, 7380 * GB, 600 * GB, 3, 100 / 8 * GB, None, "", 2),
    "a100": Device({"bfloat16": 312e12, "float32": 156e12}, 80 * 10**9, 2039 * GB, 300 * GB, 0, 25 * GB, None, ""),
    "h100": Device({"bfloat16": 989e12, "float32": 494e12}, 80 * 10**9, 3350 * GB, 450 * GB, 0, 50 * GB, 4.92, "December 2024"),
    "h200": Device({"bfloat16": 989e12, "float32": 494e12}, 141 * 10**9, 4800 * GB, 450 * GB, 0, 50 * GB, 5.41, "December 2024"),
    "b200": Device({"bfloat16": 2250e12, "float32": 1100e12}, 180 * 10**9, 8000 * GB, 900 * GB, 0, 50 * GB, None, ""),
}


KINDS: dict[str, str | float] = {
    **{"v5p": "v5p", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "tpu7x": "tpu7x"},
    "v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "h100 pcie": 756e12,  # nvidia.com H100 data sheet, without sparsity
    **{"h200": "h200", "h100": "h100", "b200": "b200", "a100": "a100"},
    "l40s": 362e12,  # nvidia.com L40S data sheet, without sparsity
}
"""Words of jax's device_kind, the first that match -> the row of `DEVICES`, or bfloat16 FLOP/s of a chip that has none there.
jax calls a v5p "TPU v5"."""


def peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """(FLOP/s that all `devices` could reach, where the figure is from).

    Accelerators: the bfloat16 figure of `devices`. CPUs: a float32 product measured here, once for each process, since a
    process's devices share its cores. (None, why) for a chip that is not in the table.
    """
    device = devices[0]
    if device.platform == "cpu":
        processes = len({d.process_index for d in devices})
        return processes * measured_matmul_flops(), "a float32 product of 1024^3, measured"
    kind = device.device_kind.lower()
    for words, chip in KINDS.items():
        if words in kind:
            flops = DEVICES[chip].flops["bfloat16"] / DEVICES[chip].devices_per_chip if isinstance(chip, str) else chip
            return len(devices) * flops, f"{len(devices)} x {flops / 1e12:g} TFLOP/s (bfloat16, {device.device_kind})"
    return None, f"no figure for {device.device_kind}"


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
