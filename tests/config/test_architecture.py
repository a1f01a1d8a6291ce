"""The model section by values just beyond their limits, and what no file format can express."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.config.architecture import without_format
from tests.config.tiny import DENSE, SIGMOID, config_with, refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.attention.num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"model.attention.head_dim": 5}, "head_dim 5 is odd"),
        ({"model.attention.windows": []}, "at least 1 item"),
        ({"model.attention.windows": [0]}, "greater than or equal to 1"),
        ({"model.attention.windows": [None, 8]}, "family mixtral cannot have interleaved attention.windows; only ministral can"),
        ({"model.attention.windows": [8, 8, 8]}, "num_layers 2 is not a multiple of the 3 attention.windows"),
        ({"model.ffn.experts_per_token": 5}, "experts_per_token 5 exceeds num_experts 4"),
        ({"model.ffn": DENSE}, "family mixtral cannot have a dense ffn"),
        ({"model.family": "llama"}, "family llama cannot have a moe ffn"),
        ({"model.family": "llama", "model.ffn": DENSE}, "family llama cannot have an attention window"),
        (
            {"model.rope": {"name": "yarn", "factor": 2.0, "original_max_seq_len": 8}},
            "family mixtral cannot have a yarn rope; only ministral3, mistral4, deepseek_v3 can",
        ),
        ({"model.attention.query_scaling": {"beta": 0.1, "original_max_seq_len": 8}}, "cannot have attention.query_scaling"),
        (
            {"model.ffn.dense_layers": {"count": 1, "ffn_dim": 8}},
            "model has dense first layers, which no file format of family mixtral can express",
        ),
        ({"model.ffn.dense_layers": {"count": 2, "ffn_dim": 8}}, "ffn.dense_layers.count 2 leaves no sparse layer of num_layers 2"),
        ({"model.ffn.dense_layers": {"count": 0, "ffn_dim": 8}}, "greater than or equal to 1"),
        (
            {"model.ffn.router": {"name": "softmax", "scale": 2.0}},
            "model has a softmax router with a scale (ffn.router.scale), which no file format",
        ),
        ({"model.ffn.router": {**SIGMOID, "groups_per_token": 2}}, "groups_per_token 2 exceeds num_groups 1"),
        ({"model.ffn.router": {**SIGMOID, "num_groups": 3}}, "router.num_groups 3 does not divide num_experts 4 into groups"),
        ({"model.ffn.router": {**SIGMOID, "num_groups": 2, "groups_per_token": 2}}, "so it limits nothing; leave both out"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, None),
        ({"model.family": "mistral", "model.ffn": DENSE, "loss": {}}, None),
        ({"model.ffn.num_shared_experts": 1, "export": "none"}, "shared experts"),
        (
            {"model.ffn.router": {**SIGMOID, "bias": True}, "loss.bias_update_rate": 0.001, "export": "none"},
            "a sigmoid router and a router bias",
        ),
    ],
)
def test_parts_without_a_file_format_are_named(changes: dict[str, Any], part: str | None) -> None:
    model = config_with(**changes).model
    assert model is not None and without_format(model) == part
