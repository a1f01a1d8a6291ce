"""What PEFT makes of an adapter's names: tensors without a module, and modules without a tensor, are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moe_train.proof.base_modules import BaseModules, check_adapter_names, exported_modules, read_base_modules
from moe_train.proof.checks import Fault
from tests.proof.exported import MODEL

Q = "layers.0.self_attn.q_proj"
TOWER = "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
WRAPPED = BaseModules("Mistral3ForConditionalGeneration", True, frozenset({f"model.language_model.{Q}.weight", TOWER}))
TEXT = BaseModules("MistralForCausalLM", False, frozenset({f"model.{Q}.weight"}))


def pair(module: str) -> list[str]:
    return [f"base_model.model.{module}.lora_{matrix}.weight" for matrix in "AB"]


def base(directory: Path, architecture: str, tensors: dict[str, tuple[int, ...]]) -> BaseModules:
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    safetensors.numpy.save_file(arrays, directory / "model.safetensors")
    safetensors.numpy.save_file({"layers.0.attention.wq.weight": np.zeros(2)}, directory / "consolidated.safetensors")
    return read_base_modules(directory)


@pytest.mark.parametrize(
    ("old", "tower"), [("language_model.model.", "vision_tower."), ("model.language_model.", "model.vision_tower.")]
)
def test_a_wrapper_has_the_names_of_memory(old: str, tower: str, tmp_path: Path) -> None:
    tower_name = TOWER.replace("model.vision_tower.", tower)
    found = base(tmp_path, "Mistral3ForConditionalGeneration", {f"{old}{Q}.weight": (2, 2), tower_name: (2, 2)})
    assert found.is_wrapper and found.weights == WRAPPED.weights | {"lm_head.weight"}


def test_fused_experts_are_a_matrix_each(tmp_path: Path) -> None:
    layer = "model.layers.0."
    fused = {f"{layer}mlp.experts.gate_up_proj": (2, 6, 4), f"{layer}mlp.experts.down_proj": (2, 4, 3)}
    found = base(tmp_path, "MixtralForCausalLM", fused | {f"{layer}mlp.gate.weight": (2, 4)})
    experts = {f"{layer}block_sparse_moe.experts.{e}.{leaf}.weight" for e in range(2) for leaf in ("w1", "w2", "w3")}
    assert found.weights == {*experts, f"{layer}block_sparse_moe.gate.weight", "lm_head.weight"}
    assert found.weights <= exported_modules(MODEL).weights


@pytest.mark.parametrize(
    ("modules", "targets", "base", "message"),
    [
        ([f"model.language_model.{Q}"], ["self_attn.q_proj"], WRAPPED, None),
        ([f"model.language_model.{Q}"], r"model\.language_model\.layers\.\d+\.self_attn\.q_proj", WRAPPED, None),
        ([f"model.{Q}"], ["q_proj"], TEXT, None),
        ([f"model.{Q}"], ["self_attn.q_proj"], WRAPPED, "belongs to no module of the base"),
        ([f"model.language_model.{Q}"], ["q_proj"], TEXT, "belongs to no module of the base"),
        ([f"model.language_model.{Q}"], ["q_proj"], WRAPPED, r"also selects model\.vision_tower"),
        ([f"model.language_model.{Q}"], r".*\.q_proj", WRAPPED, r"also selects model\.vision_tower"),
        ([f"model.{Q}"], ["k_proj"], TEXT, "is not selected by target_modules"),
        ([f"model.{Q}"], None, TEXT, "is not selected by target_modules"),
        ([], ["q_proj"], TEXT, "also selects"),
    ],
)
def test_names_that_peft_would_leave_out_or_add(modules: list[str], targets: Any, base: BaseModules, message: str | None) -> None:
    adapter = [name for module in modules for name in pair(module)]
    if message is None:
        assert check_adapter_names(adapter, {"target_modules": targets}, base).metrics["count"] == len(modules)
        return
    with pytest.raises(Fault, match=message):
        check_adapter_names(adapter, {"target_modules": targets}, base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["model.language_model.norm"], None),
        (["norm"], "also selects model.vision_tower.ln_norm"),
        (["vision_tower"], "is not selected by modules_to_save"),
        ([], "is not selected by modules_to_save"),
        (["model.language_model"], r"also selects model\.language_model\.layers"),
    ],
)
def test_modules_to_save_select_what_is_in_the_files(targets: list[str], message: str | None) -> None:
    weights = {*WRAPPED.weights, "model.language_model.norm.weight", "model.vision_tower.ln_norm.weight"}
    base = WRAPPED._replace(weights=frozenset(weights))
    settings = {"target_modules": [], "modules_to_save": targets}
    adapter = ["base_model.model.model.language_model.norm.weight"]
    if message is None:
        assert check_adapter_names(adapter, settings, base).metrics["replaced"] == 1
        return
    with pytest.raises(Fault, match=message):
        check_adapter_names(adapter, settings, base)


def test_weights_in_full_have_to_be_the_bases() -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": [f"{Q}"]}
    adapter = pair(f"model.{Q}")
    check_adapter_names([*adapter, f"base_model.model.model.{Q}.weight"], settings, TEXT)
    with pytest.raises(Fault, match=r"norm\.weight belongs to no module"):
        check_adapter_names([*adapter, "base_model.model.model.norm.weight"], settings, TEXT)
    with pytest.raises(Fault, match="belongs to no module"):
        check_adapter_names([f"model.{Q}.lora_A.weight"], settings, TEXT)
