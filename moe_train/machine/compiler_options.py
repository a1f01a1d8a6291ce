"""XLA compiler options beyond the defaults, in one place, each with its reason.

`train`, `bench` and `plan` compile with the same options (`train.step.compile_step`). The figures are for Mixtral 8x7B on 64
v5p chips, fsdp 8 x expert 8, a sequence of 4096 tokens per chip, JAX 0.10.2, in bytes that a chip receives in a step.
"Overlapped" bytes are those of collectives for which `plan.hlo` finds products between start and end. By default there are
none: XLA:TPU fuses an asynchronous collective with a product of its own, and ours are in Pallas kernels.

Tried without benefit (two layers):
- xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call, xla_tpu_mosaic_fusion: the same program; with the fusions
  of collectives that MaxText enables, the compiler takes more than 18 GB of the host's memory.
- gathers on SparseCores (xla_tpu_enable_sparse_core_collective_offload_all_gather): those of the experts stay as they are,
  0.007 of 2.08 GB become overlapped, fewer of the scatters are, and memory grows by half a GiB.
"""

from __future__ import annotations

V5P = ("TPU v5", "TPU v5p")
"""Names of the v5p that the compiler and the device use."""


def compiler_options(device_kind: str) -> dict[str, str | bool]:
    """Return the options of `jax.stages.Lowered.compile` for a kind of device; empty for the defaults."""
    if device_kind in V5P:
        return {
            # SparseCores move data while anything else runs: of 11.4 GB of gradients scattered along fsdp, 11.2 GB are overlapped,
            # for 4% more compile time, and the step still takes less than 18 GiB.
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
        }
    return {}


def brief_options(platform: str) -> dict[str, int | bool]:
    """Return the options for programs that run once, such as self-tests and random weights; empty for the defaults."""
    if platform == "cpu":
        # XLA's plain loops in place of its fusion emitters, at LLVM's second level: the random weights of workload S
        # (tests/benchmarks) take 1.3 CPU seconds of compilation in place of 6.0, and its self-tests 1.7 in place of 2.7. The
        # program that draws the weights runs as fast, and every bit of them is the same.
        return {"xla_backend_optimization_level": 2, "xla_cpu_use_fusion_emitters": False}
    return {}
