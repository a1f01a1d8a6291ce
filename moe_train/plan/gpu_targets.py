"""Descriptions of GPUs for XLA's compiler, so that it can compile without a GPU.

Sources: NVIDIA's CUDA C++ programming guide (compute capabilities: threads, registers and shared memory of a multiprocessor)
and data sheets (multiprocessors, L2, clocks, bandwidth). Memory is what the driver reports as usable.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """The properties of a GPU that XLA's compiler asks for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    float32_units: int
    """Float32 units of one multiprocessor."""
    shared_bytes: int
    """Shared memory of one multiprocessor."""
    shared_bytes_per_block: int
    """The most shared memory that a kernel can request."""
    l2_bytes: int
    clock_ghz: float
    bytes_per_second: int
    memory_bytes: int


KIB = 2**10
MIB = 2**20
GPU_TARGETS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * KIB, 163 * KIB, 40 * MIB, 1.41, 2_039_000_000_000, 85_100_068_864),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * KIB, 227 * KIB, 50 * MIB, 1.98, 3_352_000_000_000, 84_942_979_072),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228 * KIB, 227 * KIB, 50 * MIB, 1.98, 4_800_000_000_000, 151_397_597_184),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 228 * KIB, 227 * KIB, 126 * MIB, 1.965, 7_672_000_000_000, 191_514_411_008),
}


def description(gpu: str) -> str:
    """Return the text of XLA's GpuTargetConfigProto for a key of GPU_TARGETS."""
    g = GPU_TARGETS[gpu]
    features = "ACCELERATED_FEATURES" if g.capability >= (9, 0) else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {g.capability[0]} minor: {g.capability[1]} feature_extension: {features} }}
  core_count: {g.multiprocessors}
  fpus_per_core: {g.float32_units}
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  shared_memory_per_core: {g.shared_bytes}
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {g.shared_bytes_per_block}
  l2_cache_size: {g.l2_bytes}
  clock_rate_ghz: {g.clock_ghz}
  memory_bandwidth: {g.bytes_per_second}
  device_memory_size: {g.memory_bytes}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{g.name}"
"""
