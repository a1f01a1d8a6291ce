"""What is asked of the compilers, for which devices; tests/model/test_tpu.py has what comes of it."""

from __future__ import annotations

import pytest

from moe_train.machine.compiler_options import brief_options, compiler_options


@pytest.mark.parametrize("device_kind", ["", "cpu", "AMD Instinct MI300X", "TPU v5 lite", "TPU v6 lite"])
def test_only_what_was_compiled_for_is_asked_of(device_kind: str) -> None:
    assert compiler_options(device_kind) == {}


@pytest.mark.parametrize("device_kind", ["TPU v5", "TPU v5p"])
def test_gathers_and_sums_run_on_the_sparse_cores_of_a_v5p(device_kind: str) -> None:
    options = compiler_options(device_kind)
    kinds = ("reduce_scatter", "all_gather", "all_reduce")
    assert all(options[f"xla_tpu_enable_sparse_core_collective_offload_{kind}"] for kind in kinds)


def test_several_collectives_may_be_under_way_on_nvidia() -> None:
    assert compiler_options("NVIDIA H100 80GB HBM3") == {"xla_gpu_experimental_parallel_collective_overlap_limit": "4"}


def test_only_on_cpus_is_compilation_itself_what_takes_the_time() -> None:
    assert brief_options("cpu")["xla_backend_optimization_level"] == 2
    assert brief_options("tpu") == brief_options("gpu") == {}
