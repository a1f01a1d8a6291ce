"""config.json as published, in old and new spelling, and everything that is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.weights.hf.config_json import read_model_config, write_model_config

# as on the hub: transformers 4.36
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL = {k: v for k, v in MIXTRAL.items() if "expert" not in k and "router" not in k} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 4096,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = {k: v for k, v in MISTRAL.items() if k != "rope_theta"} | {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "hidden_size": 3072,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": YARN,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
MINISTRAL = MISTRAL | {
    "architectures": ["MinistralForCausalLM"],
    "model_type": "ministral",
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 8,
}
LLAMA = {k: v for k, v in MISTRAL.items() if k != "sliding_window"} | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_scaling": None,
    "pretraining_tp": 1,
}


WRAPPER: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": MISTRAL | {"architectures": None},
    "vision_config": {"model_type": "pixtral", "hidden_act": "gelu"},
    "spatial_merge_size": 2,
    "image_token_index": 10,
}


def read(directory: Path, fields: dict[str, Any]) -> config.Model:
    (directory / "config.json").write_text(json.dumps(fields))
    return read_model_config(directory)


def test_mixtral_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, MIXTRAL) == config.Model(
            family="mixtral",
            vocab_size=32000,
            model_dim=4096,
            num_layers=32,
            attention=config.GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128),
            ffn=config.MoeFfn(name="moe", ffn_dim=14336, num_experts=8, experts_per_token=2),
            rope=config.DefaultRope(name="default", theta=1e6),
            norm_eps=1e-5,
            max_seq_len=32768,
        )
    assert not caplog.records


def test_windows_and_rope_of_the_others(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL).attention.windows == (4096,)
    assert read(tmp_path, MINISTRAL).attention.windows == (None, 4096, 4096, 4096)
    irregular = ["full_attention"] + ["sliding_attention"] * 31
    assert read(tmp_path, MINISTRAL | {"layer_types": irregular}).attention.windows == (None,) + (4096,) * 31
    model = read(tmp_path, MINISTRAL3)
    assert model.rope == config.YarnRope(name="yarn", factor=16.0, original_max_seq_len=16384)
    assert model.attention.query_scaling == config.QueryScaling(beta=0.1, original_max_seq_len=16384)
    assert model.tie_embeddings
    without = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "num_key_value_heads")}
    llama = read(tmp_path, without)
    assert llama.rope.theta == 10000.0 and llama.attention.num_kv_heads == 32 and llama.attention.windows == (None,)


def test_text_inside_a_vision_wrapper(tmp_path: Path) -> None:
    text = {k: v for k, v in MINISTRAL3.items() if k not in ("architectures", "tie_word_embeddings")}
    wrapper = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": {},
    }
    assert read(tmp_path, wrapper) == read(tmp_path, MINISTRAL3)
    assert read(tmp_path, wrapper | {"architectures": None, "model_type": "mistral3"}) == read(tmp_path, MINISTRAL3)
    assert read(tmp_path, WRAPPER) == read(tmp_path, MISTRAL)


@pytest.mark.parametrize(
    ("outside", "inside", "tied"), [(True, False, True), (False, True, False), (None, True, True), (None, None, False)]
)
def test_a_wrapper_ties_by_its_own_field_first(tmp_path: Path, outside: bool | None, inside: bool | None, tied: bool) -> None:
    text = {key: value for key, value in MISTRAL.items() if key != "tie_word_embeddings"}
    if inside is not None:
        text["tie_word_embeddings"] = inside
    fields = WRAPPER | {"text_config": text}
    if outside is not None:
        fields["tie_word_embeddings"] = outside
    assert read(tmp_path, fields).tie_embeddings == tied
    if outside and not inside:  # transformers does not tie a head that is in the files
        head = {"language_model.lm_head.weight": np.zeros((2, 2), np.float32)}
        safetensors.numpy.save_file(head, tmp_path / "model.safetensors")
        assert not read(tmp_path, fields).tie_embeddings


@pytest.mark.parametrize("fields", [MIXTRAL, MISTRAL, MINISTRAL, MINISTRAL3, LLAMA], ids=lambda f: f["model_type"])
def test_written_and_read_again_is_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = read(tmp_path, fields)
    written = write_model_config(model, dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    assert read(tmp_path, written) == model
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    for key, value in fields.items():  # what was published is said again
        if key not in ("transformers_version", "rope_interleaved", "rope_scaling", "pretraining_tp", "router_aux_loss_coef"):
            assert written[key] == value or (key == "rope_parameters" and value.items() <= written[key].items()), key
    assert written["head_dim"] == 128
    assert ("sliding_window" in written) == (model.family != "llama")


REFUSED = [
    (MIXTRAL, {"architectures": ["QwenForCausalLM"]}, r"architectures is \['QwenForCausalLM'\]"),
    (MIXTRAL, {"architectures": None, "model_type": "qwen2"}, "architectures is not stated, and model_type is 'qwen2'"),
    (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    (MIXTRAL, {"quantization_config": {"bits": 4}}, "quantization_config.quant_method is None, which is not supported"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "experts_per_token 9 exceeds num_experts 8"),
    (MIXTRAL, {"num_local_experts": None}, "num_local_experts is not stated"),
    (MIXTRAL, {"num_hidden_layers": ...}, "num_hidden_layers is not stated"),
    (
        MISTRAL,
        {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"},
        "text_config is None, but Mistral3ForCond",
    ),
    (MIXTRAL, {"hidden_size": "4096"}, "config.json"),
    (MIXTRAL, {"rope_theta": None}, "rope_theta is stated neither"),
    (MISTRAL, {"sliding_window": ...}, "sliding_window is not stated"),
    (MISTRAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; supported: default, yarn"),
    (MISTRAL, {"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'"),
    (MISTRAL, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    (
        MISTRAL,
        {"layer_types": ["full_attention", "sliding_attention"] * 16},
        "cannot have interleaved attention.windows; only ministral can",
    ),
    (MISTRAL, {"layer_types": ["full_attention"] * 32}, "but sliding_window is 4096, which transformers applies to every layer"),
    (MIXTRAL, {"model_type": "mistral"}, "but model_type is 'mistral' and not 'mixtral'; correct the one"),
    (WRAPPER, {"model_type": "llava"}, "but model_type is 'llava' and not 'mistral3'"),
    (MIXTRAL, {"is_causal": False}, "is_causal is False, which is not implemented; it has to be True"),
    (MIXTRAL, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it has to be true or false"),
    (WRAPPER, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it has to be true or false"),
    (MINISTRAL, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 32"),
    (MINISTRAL, {"layer_types": ["chunked_attention"] * 32}, "layer_types has 'chunked_attention'"),
    (MINISTRAL, {"sliding_window": None}, "but sliding_window is null"),
    (MINISTRAL3, {"rope_parameters": {k: v for k, v in YARN.items() if k != "factor"}}, "factor is missing"),
    (MINISTRAL3, {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor is not implemented"),
    (MINISTRAL3, {"rope_parameters": YARN | {"truncate": False}}, "truncate is not implemented"),
    (LLAMA, {"attention_bias": True}, "attention_bias is True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved is True"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'; supported"),
    (MISTRAL, {"tie_word_embeddings": True, "is_decoder": "x"}, "is_decoder is 'x', which is not understood"),
    (MIXTRAL, {"query_norm": True}, "query_norm is True, which is not understood and may change what the model computes; if it"),
    (MISTRAL, {"residual_multiplier": 0.5}, "residual_multiplier is 0.5, which is not understood"),
    (MISTRAL, {"auto_map": {"AutoModel": "x" * 99}}, "auto_map is .*…, which is not understood"),
    (
        WRAPPER,
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.quant_method is 'gptq', .* load it in transformers with dequantize",
    ),
    (WRAPPER, {"logit_scale": 2.0}, "logit_scale is 2.0, which is not understood"),
    (WRAPPER, {"text_config": MISTRAL | {"attn_gate": True}}, "attn_gate is True, which is not understood"),
    (
        WRAPPER,
        {"text_config": MISTRAL | {"model_type": "mistral5"}},
        "text_config.model_type is 'mistral5'; of Mistral3ForConditionalGeneration, only",
    ),
    (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"] * 16}, r"config\.json: family "),
]


@pytest.mark.parametrize(("fields", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_would_change_the_mathematics_is_refused_in_one_line(
    tmp_path: Path, fields: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed = {k: v for k, v in (fields | change).items() if v is not ...}
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, changed)
    assert "\n" not in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not"):
        read_model_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_model_config(tmp_path / "elsewhere")


def test_unknown_fields_that_switch_nothing_on_are_accepted(tmp_path: Path) -> None:
    off = {"query_norm": False, "adapter": None, "biases": {}, "unsloth_version": "2026.1", "top_p": 0.9}
    assert read(tmp_path, MIXTRAL | off) == read(tmp_path, MIXTRAL)


@pytest.mark.parametrize("fields", [MIXTRAL, MISTRAL, MINISTRAL3, LLAMA], ids=lambda f: f["model_type"])
def test_the_model_type_decides_if_no_class_is_stated(tmp_path: Path, fields: dict[str, Any]) -> None:
    for architectures in (None, []):
        assert read(tmp_path, fields | {"architectures": architectures}) == read(tmp_path, fields)


def test_what_config_json_has_no_words_for_is_refused(tmp_path: Path) -> None:
    two = read(tmp_path, MINISTRAL).model_copy(
        update={"attention": config.GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128, windows=(16, 32))}
    )
    with pytest.raises(ValueError, match="can state only one"):
        write_model_config(two, dtype="float32", bos_token_id=1, eos_token_id=2)
    model = read(tmp_path, MINISTRAL3)
    scaling = config.QueryScaling(beta=0.1, original_max_seq_len=5)
    other = model.model_copy(update={"attention": model.attention.model_copy(update={"query_scaling": scaling})})
    with pytest.raises(ValueError, match="has one value for both"):
        write_model_config(other, dtype="float32", bos_token_id=1, eos_token_id=2)
    odd = read(tmp_path, LLAMA).model_copy(update={"model_dim": 4097})
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        write_model_config(odd, dtype="float32", bos_token_id=1, eos_token_id=2)
