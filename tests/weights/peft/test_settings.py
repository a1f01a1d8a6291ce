"""adapter_config.json: what is not supported is refused, and patterns decide an alpha."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights.peft.settings import alpha_of, read_settings

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, 'peft_type is not stated, .*add "peft_type": "LORA"'),
        ({"r": 2.0}, r"r is 2\.0; a rank has to be a positive whole number"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it has to be an object"),
        ({"rank_pattern": {"q_proj": True}}, "q_proj is True; a rank has"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has '\('"),
        ({"layers_pattern": ["h"]}, r"layers_pattern is \['h'\] without layers_to_transform"),
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING', which adds no weights"),
        ({"bias": "some"}, "bias is 'some'"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', with .*path_initial_model_for_weight_conversion.*, or merge",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "a later method"}, "init_lora_weights is 'a later method'"),
        ({"use_qalora": True}, "use_qalora is True, .*merge_and_unload"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is .*merge_and_unload"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices is .*merge_and_unload"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"invented": 3}, "invented is 3, .*merge_and_unload"),
        ({"target_parameters": ["mlp.experts.bias"]}, "target_parameters has .*; supported are mlp.gate.weight"),
        ({"target_parameters": ["o_proj"]}, "target_parameters has 'o_proj'; supported are mlp.gate.weight"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it has to be a list of names"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; it has to be true or false"),
        ({"lora_dropout": "a"}, "lora_dropout is 'a'; it has to be a number"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; it has to be a number"),
        ({"target_modules": "("}, r"target_modules is '\(', which is not a regular expression"),
        ({"lora_alpha": None}, "lora_alpha is None; an alpha has to be a positive number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; it has to be an object"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj is -1; an alpha has to be a positive number"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(', which is not a regular expression: missing \)"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | change))
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": "all"},  # models here have none
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"layers_to_transform": [0], "megatron_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "X"}, "revision": "main", "exclude_modules": ["x"]},
        {"enable_lora": None, "merge_weights": False, "a later method": None},
        *({"target_parameters": [name]} for name in ("gate_up_proj", "experts.down_proj", "model.layers.1.mlp.gate.weight")),
    ],
    ids=str,
)
def test_bookkeeping_and_what_is_off_are_accepted(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | change))
    assert read_settings(tmp_path) == SETTINGS | change


def test_the_first_pattern_that_matches_decides_an_alpha(tmp_path: Path) -> None:
    patterns = {r"layers\.1\.self_attn\.q_proj": 1, "q_proj": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | {"alpha_pattern": patterns}))
    settings = read_settings(tmp_path)
    names = [f"model.layers.{layer}.self_attn.{module}" for layer, module in ((0, "q_proj"), (1, "q_proj"), (0, "k_proj"))]
    assert [alpha_of(settings, name) for name in names] == [3, 1, 4]
