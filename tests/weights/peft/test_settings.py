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
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"target_parameters": ["mlp.experts.bias"]}, "target_parameters has .*; supported are names that end in"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it has to be a list of names"),
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


def test_the_first_pattern_that_matches_decides_an_alpha(tmp_path: Path) -> None:
    patterns = {r"layers\.1\.self_attn\.q_proj": 1, "q_proj": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | {"alpha_pattern": patterns}))
    settings = read_settings(tmp_path)
    names = [f"model.layers.{layer}.self_attn.{module}" for layer, module in ((0, "q_proj"), (1, "q_proj"), (0, "k_proj"))]
    assert [alpha_of(settings, name) for name in names] == [3, 1, 4]
