"""config.json of models with latent attention, as transformers saves it: sizes, routers, and the softmax scale both ways."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.weights.hf import latent
from moe_train.weights.hf.config_json import read_model_config, write_model_config
from tests.tiny import DEEPSEEK_V3, LATENT, MISTRAL4

# As transformers 5.24 saves Mistral4Config.
FIELDS: dict[str, Any] = {
    "architectures": ["Mistral4ForCausalLM"],
    "model_type": "mistral4",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "head_dim": 18,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 14,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "qk_head_dim": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 0.001,
    "rope_interleave": True,
    "rope_parameters": {
        "beta_fast": 2.0,
        "beta_slow": 0.5,
        "factor": 4.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": 8 / 18,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    },
    "routed_scaling_factor": 1.7,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 6,
    "vocab_size": 64,
}
DEEPSEEK = {key: value for key, value in FIELDS.items() if key != "head_dim"} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
    "rope_parameters": {
        **{"beta_fast": 2.0, "beta_slow": 0.5, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_type": "yarn"},
        **{"original_max_position_embeddings": 8, "rope_theta": 10000.0},
    },
}


def read(directory: Path, fields: dict[str, Any], **rope: Any) -> config.Model:
    fields = {**fields, "rope_parameters": {**fields["rope_parameters"], **rope}}
    (directory / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value != "absent"}))
    return read_model_config(directory)


def written(model: config.Model) -> dict[str, Any]:
    return write_model_config(model, dtype="float32", bos_token_id=1, eos_token_id=2)


def test_both_families_as_transformers_saves_them(tmp_path: Path) -> None:
    assert read(tmp_path, FIELDS) == MISTRAL4
    assert read(tmp_path, DEEPSEEK) == DEEPSEEK_V3
    direct = MISTRAL4.model_copy(update={"attention": LATENT.model_copy(update={"q_lora_rank": None})})
    assert read(tmp_path, {**FIELDS, "q_lora_rank": None}) == direct


@pytest.mark.parametrize("correction", ["none", "mscale_squared"])
@pytest.mark.parametrize("model", [MISTRAL4, DEEPSEEK_V3], ids=["mistral4", "deepseek_v3"])
def test_what_is_written_is_read_back(model: config.Model, correction: str, tmp_path: Path) -> None:
    attention = model.attention.model_copy(update={"scale_correction": correction})
    for rope in (model.rope, model.rope.model_copy(update={"mscale": 0.0, "mscale_all_dim": float(correction != "none")})):
        changed = model.model_copy(update={"attention": attention, "rope": rope})
        assert read(tmp_path, written(changed)) == changed


def test_transformers_scale_is_a_line_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        corrected = read(tmp_path, FIELDS, mscale=1.0, mscale_all_dim=1.0, attention_factor=None)
        assert read(tmp_path, FIELDS) == MISTRAL4
    assert isinstance(corrected.attention, config.MultiHeadLatentAttention)
    assert corrected.attention.scale_correction == "mscale_squared"
    (record,) = caplog.records
    assert f"scores by {(0.1 * math.log(4) + 1) ** 2:.4f}" in record.getMessage()
    assert "scale_correction: none" in record.getMessage()


def test_the_scale_of_training_is_what_transformers_computes() -> None:
    """`mscale_all_dim` must not be truthy, and then only attention_factor keeps cos and sin as they are."""
    rope = written(MISTRAL4)["rope_parameters"]
    assert (rope["mscale"], rope["mscale_all_dim"], rope["attention_factor"]) == (0.0, 0.0, 1.0)
    rope = written(DEEPSEEK_V3)["rope_parameters"]
    assert (rope["mscale"], rope["mscale_all_dim"]) == (1.0, 1.0) and "attention_factor" not in rope


@pytest.mark.parametrize("head_dim", range(4, 400))
def test_the_share_of_rotary_dims_is_cut_to_their_number(head_dim: int) -> None:
    for rope_dim in range(2, head_dim, 2):
        sizes = LATENT.model_copy(update={"qk_nope_head_dim": head_dim - rope_dim, "qk_rope_head_dim": rope_dim})
        assert int(head_dim * latent._partial_rotary_factor(sizes)) == rope_dim


@pytest.mark.parametrize(
    ("changes", "rope", "message"),
    [
        ({"num_key_value_heads": 2}, {}, "num_key_value_heads is 2; state 4"),
        ({"qk_head_dim": 20}, {}, "qk_head_dim is 20, but"),
        ({"head_dim": 20}, {}, "head_dim is 20, neither"),
        ({"q_lora_rank": "absent"}, {}, "q_lora_rank is not stated"),
        ({"routed_scaling_factor": "absent"}, {}, "routed_scaling_factor is not stated"),
        ({"n_group": 4, "topk_group": 2}, {}, "n_group is 4 and topk_group 2, but mistral4 has no groups"),
        ({"norm_topk_prob": False}, {}, "norm_topk_prob is False"),
        ({"rope_interleave": False}, {}, "rope_interleave is False"),
        ({"scoring_func": "sigmoid"}, {}, "scoring_func is 'sigmoid'"),
        ({"num_nextn_predict_layers": 1}, {}, "num_nextn_predict_layers is 1.*remove the tensors"),
        ({"n_shared_experts": 0}, {}, "family mistral4 must have shared experts"),
        ({}, {"attention_factor": 1.5}, "attention_factor is 1.5, which is not implemented"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, not"),
        ({}, {"rope_type": "default"}, "attention_factor has no meaning without yarn"),
    ],
)
def test_rejected_in_one_line(changes: dict[str, Any], rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, {**FIELDS, **changes}, **rope)
    assert "\n" not in str(caught.value)


def test_keys_of_latent_attention_belong_to_its_families_alone(tmp_path: Path) -> None:
    mistral = {**FIELDS, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    with pytest.raises(ValueError, match="is not understood"):
        read(tmp_path, mistral)


def test_mscales_without_a_spelling_are_refused() -> None:
    uneven = MISTRAL4.model_copy(update={"rope": MISTRAL4.rope.model_copy(update={"mscale": 0.5})})
    with pytest.raises(ValueError, match=r"rope\.mscale 0\.5 and rope\.mscale_all_dim 1\.0"):
        written(uneven)
