"""A problem of a config.json is named with its key and value, where a field of the model has one key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moe_train import config
from moe_train.weights.hf.config_problem import first_problem
from tests.tiny import MIXTRAL


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"norm_eps": "1e-5"}, "rms_norm_eps is '1e-5': Input should be a valid number"),
        ({"num_layers": None}, "num_hidden_layers is None: Input should be a valid integer"),
        ({"rope": {"name": "default", "theta": -1}}, "rope_theta is -1: Input should be greater than 0"),
        (
            {"ffn": {**MIXTRAL.ffn.model_dump(), "experts_per_token": 9}},
            "ffn.moe: experts_per_token 9 exceeds num_experts 4; lower it",
        ),
    ],
)
def test_the_first_problem_is_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as raised:
        config.Model.model_validate({**MIXTRAL.model_dump(), **change})
    assert first_problem(raised.value) == problem
