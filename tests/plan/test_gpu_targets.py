"""Descriptions of GPUs for XLA's compiler."""

from __future__ import annotations

import pytest

from moe_train.plan import gpu_targets


@pytest.mark.parametrize("gpu", gpu_targets.GPU_TARGETS)
def test_descriptions_of_gpus_are_complete(gpu: str) -> None:
    text = gpu_targets.description(gpu)
    assert text.count("{") == text.count("}")
    assert f'"{gpu_targets.GPU_TARGETS[gpu].name}"' in text and gpu.upper() in text
