"""Adapters alone: the names of their base, and files that were written wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.verify import verify
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from moe_train.weights import hf, safetensors_files
from tests.commands.runs import LORA, MESH, MODEL, save_run
from tests.commands.wrapper import save_run_on_wrapper
from tests.random_parameters import random_parameters


@pytest.mark.parametrize("layout", ["peft", "mistral-lora"])
def test_an_adapter_that_was_written_wrong_is_not_exported(
    layout: Any, small_tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL, lora=LORA)
        plain = {path: x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export_model(
            plain, MODEL, tmp_path / "base", write_and_prove.WriteOptions(dtype="float32", depth="tensors")
        )
        save_run(tmp_path / "run", weights, small_tokenizer, init_from=str(tmp_path / "base"), lora=LORA)
    write = safetensors_files.write_safetensors

    def swap_experts(file: Path, specs: list[safetensors_files.TensorSpec], tensor: Callable[..., np.ndarray]) -> None:
        """Give expert 3 the matrices of expert 0."""
        write(file, specs, lambda spec: tensor(spec._replace(name=spec.name.replace("experts.3.", "experts.0."))))

    monkeypatch.setattr(safetensors_files, "write_safetensors", swap_experts)
    with pytest.raises(RuntimeError, match=r"the proof failed \(deltas\): the adapter of .*\[0, 3\] in the files is not the one"):
        export(tmp_path / "run", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_wrapper_has_the_names_of_the_wrapper(
    small_tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    record = export(tmp_path / "run", tmp_path / "out", "peft", options=ExportOptions(server="transformers"))
    tensors = safetensors_files.open_safetensors(tmp_path / "out/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert re.fullmatch(settings["target_modules"], "model.language_model.layers.1.self_attn.q_proj")
    assert not re.fullmatch(settings["target_modules"], "model.vision_tower.transformer.layers.0.attention.q_proj")
    assert "import AutoModelForImageTextToText as M" in record["serve"]
    assert record["in_wrapper"] and "left_out" not in record
    _, checks = verify(tmp_path / "out", base=tmp_path / "base")
    assert not [check for check in checks if check.passed is False]
    _, checks = verify(tmp_path / "out", run=tmp_path / "run")
    assert {check.name: check.passed for check in checks}["deltas"]
    monkeypatch.setattr(hf, "is_wrapper", lambda directory: False)
    with pytest.raises(RuntimeError, match=r"the proof failed \(.*names.*belongs to no module|the proof failed \(tensors"):
        export(tmp_path / "run", tmp_path / "wrong", "peft")
    assert not (tmp_path / "wrong").exists()
