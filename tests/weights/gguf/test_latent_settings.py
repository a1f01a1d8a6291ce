"""The keys of `mistral4` and `deepseek2`: both ways, the softmax scale, and files that are not supported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.weights.gguf import latent_settings
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.gguf.container import Gguf
from tests.tiny import LATENT
from tests.weights.mistral.models import MISTRAL4

GROUPS = config.SigmoidRouter(name="sigmoid", bias=True, scale=2.5, num_groups=2, groups_per_token=1)
DEEPSEEK = MISTRAL4.model_copy(
    update={
        "family": "deepseek_v3",
        "attention": LATENT.model_copy(update={"query_scaling": None, "scale_correction": "mscale_squared"}),
        "ffn": MISTRAL4.ffn.model_copy(update={"router": GROUPS, "dense_layers": None}),
    }
)
SMALL = MISTRAL4


def external(model: config.Model, changes: dict[str, Any] | None = None) -> Gguf:
    """The header of a file as another tool would have written it."""
    keys = {k: v if isinstance(v, str) else v.item() for k, v in gguf_settings.architecture_settings(model).items()}
    del keys[gguf_settings.MODEL_KEY]
    stated = {k: v for k, v in (keys | (changes or {})).items() if v is not None}
    names = ["output.weight"] + ["blk.3.exp_probs_b.bias"] * model.ffn.router.bias  # type: ignore[union-attr]
    return Gguf(Path("x.gguf"), stated, dict.fromkeys(names))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [SMALL, DEEPSEEK], ids=["mistral4", "deepseek2"])
@pytest.mark.parametrize("correction", ["none", "mscale_squared"])
def test_the_keys_are_read_back_as_the_same_model(model: config.Model, correction: str, caplog: pytest.LogCaptureFixture) -> None:
    attention = model.attention.model_copy(update={"scale_correction": correction})
    model = model.model_copy(update={"attention": attention})
    assert gguf_settings.read_architecture(external(model)) == model
    assert not caplog.records


def llama_cpp_scale(keys: dict[str, Any]) -> tuple[float, float]:
    """The factors on scores and on cos and sin, as llama-context.cpp and deepseek2.cpp compute them."""
    prefix = f"{keys['general.architecture']}.rope.scaling"
    log_factor = math.log(keys[f"{prefix}.factor"])
    log_multiplier = keys.get(f"{prefix}.yarn_log_multiplier", 0.0) / 0.1
    attn_factor = 1.0 if log_multiplier else 1 + 0.1 * log_factor
    attn_factor *= keys.get(f"{prefix}.attn_factor", 1.0) / (1 + 0.1 * log_factor)
    original = attn_factor * (1 + 0.1 * log_factor)
    return (original * (1 + 0.1 * log_multiplier * log_factor)) ** 2, attn_factor * (1 + 0.1 * log_factor)


@pytest.mark.parametrize("factor", [4.0, 36.0, 128.0])
def test_llama_cpp_computes_the_scale_of_the_config(factor: float) -> None:
    rope = MISTRAL4.rope.model_copy(update={"factor": factor})
    corrected = SMALL.model_copy(
        update={"rope": rope, "attention": LATENT.model_copy(update={"scale_correction": "mscale_squared"})}
    )
    plain = corrected.model_copy(update={"attention": LATENT})
    mscale = 0.1 * math.log(factor) + 1
    assert llama_cpp_scale(external(plain).settings) == pytest.approx((1, 1), rel=1e-6)
    assert llama_cpp_scale(external(corrected).settings) == pytest.approx((mscale**2, 1), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mistral4.attention.key_length_mla": None}, "attention.key_length_mla is missing"),
        ({"mistral4.attention.head_count_kv": 4}, "attention.head_count_kv is 4; with attention.key_length_mla it has to be 1"),
        ({"mistral4.expert_weights_norm": False}, "expert_weights_norm is false"),
        ({"mistral4.expert_gating_func": 3}, "expert_gating_func is 3; supported: 1"),
        ({"mistral4.expert_group_count": 2}, "expert_group_count is 2, which is supported only with a sigmoid router"),
        ({"mistral4.nextn_predict_layers": 1}, "nextn_predict_layers is 1"),
        ({"mistral4.rope.scaling.attn_factor": None}, "attn_factor is 1, which scales the rotary dims; supported: 0.87"),
        ({"mistral4.rope.scaling.yarn_log_multiplier": 0.0707}, "has yarn_log_multiplier 0.0707 and attn_factor 0.87"),
        ({"mistral4.rope.scaling.type": "linear"}, "rope.scaling is linear by 4"),
        ({"mistral4.attention.temperature_length": None}, "attention.temperature_length is missing"),
        ({"mistral4.attention.layer_norm_rms_epsilon": float(np.float32(1e-5))}, "norm_eps is 1e-05"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_that_are_not_supported_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        gguf_settings.read_architecture(external(SMALL, changes))
    assert str(refused.value).startswith("x.gguf: ") and message in str(refused.value) and "\n" not in str(refused.value)


def test_without_gating_and_weight_keys_a_router_is_a_softmax_with_scale_1() -> None:
    changes = {"mistral4.expert_gating_func": None, "mistral4.expert_weights_scale": 0.0}
    ffn = gguf_settings.read_architecture(external(SMALL, changes)).ffn
    assert isinstance(ffn, config.MoeFfn) and ffn.router == config.SoftmaxRouter(name="softmax")


@pytest.mark.parametrize(
    ("model", "attention", "rope", "message"),
    [
        ({}, {"q_lora_rank": None}, {}, "q_lora_rank is null, which llama.cpp has only for 26 or 27 layers"),
        ({}, {}, {"mscale": 0.0, "mscale_all_dim": 0.0}, "scale the rotary dims"),
        ({}, {"scale_correction": "mscale_squared"}, {"mscale": 0.5, "mscale_all_dim": 0.5}, "llama.cpp assumes 1"),
        ({"norm_eps": 1e-5}, {}, {}, "norm_eps is 1e-05"),
    ],
)
def test_models_that_llama_cpp_would_compute_differently_are_refused(
    model: dict[str, Any], attention: dict[str, Any], rope: dict[str, Any], message: str
) -> None:
    changed = {"attention": LATENT.model_copy(update=attention), "rope": MISTRAL4.rope.model_copy(update=rope)}
    with pytest.raises(ValueError, match=message):
        gguf_settings.architecture_settings(SMALL.model_copy(update=changed | model))


def test_the_architecture_is_the_familys() -> None:
    assert latent_settings.architecture(SMALL) == "mistral4"
    assert latent_settings.architecture(DEEPSEEK) == "deepseek2"
