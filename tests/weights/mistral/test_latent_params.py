"""params.json of models with multi-head latent attention: released models both ways, the softmax scale, and bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.weights.mistral import params_json
from tests.weights.mistral.models import MISTRAL4

PARAMS = params_json.write_model_config(MISTRAL4)
LARGE_3 = {
    "dim": 7168,
    "n_layers": 61,
    "head_dim": 192,
    "hidden_dim": 16384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "vocab_size": 131072,
    "tied_embeddings": False,
    "max_position_embeddings": 294912,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "yarn": {"original_max_position_embeddings": 8192, "factor": 36, "apply_scale": False, "beta": 32, "alpha": 1},
    "moe": {
        "expert_parallel": 1,
        "expert_model_parallel": 1,
        "route_every_n": 1,
        "first_k_dense_replace": 3,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 4096,
        "num_shared_experts": 1,
        "renorm_strategy": "WEIGHTS",
        "use_load_balancing_bias": False,
    },
}
"""The fields of Mistral Large 3's params.json that describe its text model."""


def read(params: dict[str, Any], folder: Path) -> config.Model:
    (folder / "params.json").write_text(json.dumps(params))
    return params_json.read_model_config(folder)


def test_large_3_is_read_and_written_as_its_file_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = read(LARGE_3, tmp_path)
    assert not caplog.records
    ffn = model.ffn
    attention = model.attention
    assert isinstance(ffn, config.MoeFfn) and isinstance(attention, config.MultiHeadLatentAttention)
    assert (model.family, model.max_seq_len, attention.scale_correction) == ("mistral4", 294912, "none")
    assert ffn.dense_layers == config.DenseLayers(count=3, ffn_dim=16384)
    assert (ffn.ffn_dim, ffn.num_experts, ffn.experts_per_token, ffn.num_shared_experts) == (4096, 128, 4, 1)
    written = params_json.write_model_config(model)
    moe = {key: value for key, value in LARGE_3["moe"].items() if not key.endswith("parallel")}  # type: ignore[attr-defined]
    assert written == {**LARGE_3, "moe": moe, "max_seq_len": 294912}


@pytest.mark.parametrize("correction", ["none", "mscale_squared"])
def test_the_softmax_scale_is_apply_scale(correction: str, tmp_path: Path) -> None:
    attention = MISTRAL4.attention.model_copy(update={"scale_correction": correction})
    model = MISTRAL4.model_copy(update={"attention": attention})
    params = params_json.write_model_config(model)
    assert params["yarn"]["apply_scale"] == (correction == "mscale_squared")
    assert read(params, tmp_path) == model


def test_a_factor_of_one_leaves_nothing_to_correct(tmp_path: Path) -> None:
    yarn = {**PARAMS["yarn"], "factor": 1.0, "apply_scale": True}
    attention = read({**PARAMS, "yarn": yarn}, tmp_path).attention
    assert isinstance(attention, config.MultiHeadLatentAttention) and attention.scale_correction == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing, which multi-head latent attention (kv_lora_rank) requires"),
        ({"q_lora_rank": None}, "q_lora_rank is missing"),
        ({"n_kv_heads": 2}, "n_kv_heads is 2; with kv_lora_rank it has to be n_heads, 4"),
        ({"head_dim": 10}, "head_dim is 10; with kv_lora_rank it has to be the sum of both qk head dims, 18"),
        ({"sliding_window": 4}, "sliding_window is stated"),
        ({"moe": None}, "no dense family can have all of"),
        ({"yarn": None}, "no sparse family can have all of"),
        ({"moe": {**PARAMS["moe"], "use_load_balancing_bias": True}}, "moe.use_load_balancing_bias: Input should be False"),
        ({"moe": {**PARAMS["moe"], "route_every_n": 2}}, "moe.route_every_n: Input should be 1"),
        ({"moe": {**PARAMS["moe"], "renorm_strategy": "LOGITS"}}, "moe.renorm_strategy: Input should be 'WEIGHTS'"),
        ({"moe": {**PARAMS["moe"], "first_k_dense_replace": 4}}, "ffn.dense_layers.count 4 leaves no sparse layer"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05; vLLM uses it for the norms of latents too"),
        ({"qk_rope_head_dim": 7, "head_dim": 17}, "qk_rope_head_dim 7 is odd"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_fields_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read({**PARAMS, **change}, tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("attention", "rope", "message"),
    [
        ({"q_lora_rank": None}, {}, "q_lora_rank is null, for which vLLM has no native tensor names"),
        ({}, {"mscale": 0.7}, r"rope.mscale 0.7 and rope.mscale_all_dim 1.0 scale the rotary dims"),
        ({}, {"mscale": 0.0, "mscale_all_dim": 0.0}, "scale the rotary dims"),
        ({"scale_correction": "mscale_squared"}, {"mscale": 0.5, "mscale_all_dim": 0.5}, "can only express 1"),
    ],
)
def test_models_that_params_json_cannot_express_are_refused(attention: dict[str, Any], rope: dict[str, Any], message: str) -> None:
    model = MISTRAL4.model_copy(
        update={"attention": MISTRAL4.attention.model_copy(update=attention), "rope": MISTRAL4.rope.model_copy(update=rope)}
    )
    with pytest.raises(ValueError, match=message):
        params_json.write_model_config(model)
