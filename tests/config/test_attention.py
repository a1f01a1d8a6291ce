"""The kinds of attention: their tag, their checks, and the correction of the softmax scale."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from moe_train import config

LATENT: dict[str, Any] = {
    "name": "mla",
    "num_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
}
YARN: dict[str, Any] = {"name": "yarn", "theta": 1e4, "factor": 4.0, "original_max_seq_len": 8}


def model(**changes: Any) -> config.Model:
    fields: dict[str, Any] = {
        "family": "mistral4",
        "vocab_size": 64,
        "model_dim": 32,
        "num_layers": 3,
        "attention": LATENT,
        "ffn": {"name": "moe", "ffn_dim": 16, "num_experts": 8, "experts_per_token": 3, "num_shared_experts": 1},
        "rope": YARN,
    }
    return config.Model.model_validate_json(json.dumps({**fields, **changes}))


def test_a_section_without_a_name_is_grouped_query_attention() -> None:
    dense = {"family": "mistral", "ffn": {"name": "dense", "ffn_dim": 8}, "rope": {"name": "default"}}
    grouped = model(**dense, attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "windows": [4]})
    assert grouped.attention == config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, windows=(4,))
    assert config.Model.model_validate_json(grouped.model_dump_json()) == grouped


def test_latent_attention_is_read_back_from_its_dump() -> None:
    latent = model(attention={**LATENT, "scale_correction": "mscale_squared", "q_lora_rank": None})
    assert isinstance(latent.attention, config.MultiHeadLatentAttention)
    assert latent.attention.qk_head_dim == 18
    assert config.Model.model_validate_json(latent.model_dump_json()) == latent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": {**LATENT, "qk_rope_head_dim": 7}}, "qk_rope_head_dim 7 is odd"),
        ({"attention": {**LATENT, "windows": [4]}}, "Extra inputs"),
        ({"attention": {"name": "mha"}}, "'mha'"),
        ({"rope": {"name": "default"}}, "must have a yarn rope"),
        ({"family": "mixtral"}, "family mixtral cannot have multi-head latent attention"),
        ({"family": "deepseek_v3"}, "family deepseek_v3 must have a sigmoid router"),
        (
            {"rope": {**YARN, "mscale_all_dim": 0.0}, "attention": {**LATENT, "scale_correction": "mscale_squared"}},
            "scale_correction mscale_squared has no effect",
        ),
    ],
)
def test_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**changes)


def test_what_is_not_supported_yet_is_named() -> None:
    with pytest.raises(ValueError, match="plan is not supported for multi-head latent attention"):
        config.require_grouped_query(model().attention, "plan")


def test_the_scale_of_a_softmax_router_is_dumped_only_if_it_is_not_one() -> None:
    assert "scale" not in config.SoftmaxRouter(name="softmax").model_dump()
    assert config.SoftmaxRouter(name="softmax", scale=1.7).model_dump()["scale"] == 1.7
