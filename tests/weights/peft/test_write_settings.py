"""adapter_config.json as it is written: targets, parameters and patterns of each family."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.weights import names
from moe_train.weights.peft.fused_parameters import fused_parameters
from moe_train.weights.peft.pieces import matrix_for_each_expert
from moe_train.weights.peft.write_settings import adapter_config
from moe_train.weights.serve import AdapterShape
from tests.tiny import DEEPSEEK_V3, MISTRAL4
from tests.weights.peft.adapters import LORA

DENSE, SPARSE = "stacks.0.layers.0", "stacks.1.layers.0"
SHAPES = {
    f"{DENSE}.ffn.up_proj": AdapterShape(2, 4.0),
    f"{SPARSE}.ffn.up_proj": AdapterShape(2, 4.0),
    f"{SPARSE}.ffn.shared.up_proj": AdapterShape(3, 6.0),
    f"{DENSE}.attention.o_proj": AdapterShape(2, 4.0),
    f"{SPARSE}.attention.o_proj": AdapterShape(2, 4.0),
}


def written(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> dict[str, Any]:
    layout = matrix_for_each_expert(layout, model)
    return adapter_config(model, SHAPES, list(fused_parameters(model, SHAPES, layout)), LORA, layout, [])


def test_linear_maps_are_modules_and_experts_parameters() -> None:
    settings = written(MISTRAL4)
    assert settings["target_modules"] == ["mlp.up_proj", "o_proj", "shared_experts.up_proj"]
    assert settings["target_parameters"] == ["mlp.experts.gate_up_proj"]
    assert (settings["r"], settings["rank_pattern"]) == (2, {"shared_experts.up_proj": 3})


def test_all_of_a_deepseek_v3_is_parameters_whose_last_names_peft_takes_for_experts() -> None:
    settings = written(DEEPSEEK_V3)
    assert settings["target_modules"] == ["o_proj"]
    shared = "mlp.shared_experts.up_proj.weight"
    assert settings["target_parameters"] == ["mlp.experts.gate_up_proj", shared, "mlp.up_proj.weight"]
    assert settings["rank_pattern"] == {shared: 3} and settings["alpha_pattern"] == {shared: 6}


@pytest.mark.parametrize("model", [MISTRAL4])
def test_modules_of_a_wrapper_are_named_as_a_whole(model: config.Model) -> None:
    settings = written(model, names.WRAPPED)
    assert settings["target_modules"].startswith(r"model\.language_model\.layers\.\d+\.(")
    assert r"mlp\.up_proj" in settings["target_modules"] and "gate_up" not in settings["target_modules"]
    assert settings["target_parameters"] == ["mlp.experts.gate_up_proj"]
