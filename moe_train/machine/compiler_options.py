"""XLA compiler options beyond the defaults, in one place, each with its reason.

`train`, `bench` and `plan` compile with the same options (`train.step.compile_step`). The figures are for Mixtral 8x7B on 64
v5p chips, fsdp 8 x expert 8, a sequence of 4096 tokens per chip, JAX 0.10.2, in bytes that a chip receives in a step.
"Overlapped" bytes are those of collectives for which `plan.hlo` finds products between start and end. By default there are
none: XLA:TPU fuses an asynchronous collective with a product of its own, and ours are in Pallas kernels. SparseCores move data
beside anything, and v5p has four of them.

Tried without benefit (two layers):
- xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call, xla_tpu_mosaic_fusion: the same program; with the fusions
  of collectives that MaxText enables, the compiler takes more than 18 GB of the host's memory.
- xla_tpu_enable_sparse_core_collective_offload_3d_all_gather: the same program.
"""

from __future__ import annotations

import jax

V5P = ("TPU v5", "TPU v5p")
"""Names of the v5p that the compiler and the device use."""


def compiler_options(device_kind: str) -> dict[str, str | bool]:
    """Return the options of `jax.stages.Lowered.compile` for a kind of device; empty for the defaults."""
    if device_kind in V5P:
        return {
            # Of 11.4 GB of gradients scattered along fsdp, 11.4 GB are overlapped.
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
            # Of 24.5 GB of weights gathered along fsdp, 24.0 GB are overlapped. The second option is for dims that are not the
            # outermost one in memory, as those of expert weights.
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
            # Several collectives may wait for the SparseCores. Otherwise each starts when the one before has ended, and the
            # scheduler finds no product for 4.4 GB of the gradients and 2.9 GB of the weights.
            "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": True,
            # Of 2.56 GB of gradients that 8 replicas sum along data (512 chips), 2.55 GB are overlapped, and none without it.
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
        }
    if device_kind.startswith("NVIDIA"):
        # Several collectives may be under way. Otherwise each starts when the one before has ended: of the gathered bytes of
        # Mixtral 8x7B with adapters 33% are received beside products in place of 99% (docs/measurements.md, "Eight H100").
        return {"xla_gpu_experimental_parallel_collective_overlap_limit": "4"}
    return {}


def brief_options(platform: str) -> dict[str, int | bool]:
    """Return the options for programs that run once, such as self-tests and random weights; empty for the defaults."""
    if platform == "cpu":
        # XLA's plain loops in place of its fusion emitters, at LLVM's second level: the random weights of workload S
        # (tests/benchmarks) take 1.3 CPU seconds of compilation in place of 6.0, and its self-tests 1.7 in place of 2.7. The
        # program that draws the weights runs as fast, and every bit of them is the same.
        options: dict[str, int | bool] = {"xla_backend_optimization_level": 2}
        if jax.__version_info__ < (0, 12):
            options["xla_cpu_use_fusion_emitters"] = False  # newer ones have no choice, and refuse the option
        return options
    return {}
