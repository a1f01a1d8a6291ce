"""A scaled adapter is compared with the one that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moe_train.proof.checks import Fault
from moe_train.proof.scaled import prove_scaled

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SETTINGS = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"k_proj": 2}, "use_rslora": False}


def write(directory: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("settings", "tensors", "fault"),
    [
        ({}, {}, None),
        ({"lora_alpha": 4}, {}, "the alpha of lora_alpha is 4, not 0.5 x 4"),
        ({"alpha_pattern": {"k_proj": 2}}, {}, "the alpha of k_proj is 2, not 0.5 x 2"),
        ({"alpha_pattern": {}}, {}, "differs from that in .* in more than its alphas"),
        ({"use_rslora": True}, {}, "differs from that in .* in more than its alphas"),
        ({}, {NAME: np.zeros((2, 4), np.float32)}, f"{NAME} in .* differs from that in"),
        ({}, {"more": np.ones(1, np.float32)}, "do not have the same tensors: only one of them has more"),
    ],
)
def test_every_fault_is_found(settings: dict[str, Any], tensors: Any, fault: str | None, tmp_path: Path) -> None:
    held = {NAME: np.ones((2, 4), np.float32)}
    source = write(tmp_path / "source", SETTINGS, held)
    half = {"lora_alpha": 2.0, "alpha_pattern": {"k_proj": 1.0}}
    scaled = write(tmp_path / "scaled", SETTINGS | half | settings, held | tensors)
    if fault is None:
        prove_scaled(scaled, source, 0.5)
        return
    with pytest.raises(Fault, match=fault):
        prove_scaled(scaled, source, 0.5)
