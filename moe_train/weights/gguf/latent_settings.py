"""The keys of a GGUF file with multi-head latent attention: llama.cpp's `mistral4` and `deepseek2`, which share their code.

llama.cpp stores the absorbed form of the attention: one key head of R + P numbers and one value head of R (R: kv_lora_rank, P:
qk_rope_head_dim). Scores are multiplied by the square of

    a * (1 + 0.1 ln factor) * (1 + l ln factor)

where a is `rope.scaling.attn_factor` and l is `rope.scaling.yarn_log_multiplier`, 0 if it is left out; an l other than 0 divides by
1 + 0.1 ln factor first. cos and sin are multiplied by the first two factors. So l = 0.1 and a = 1 compute `scale_correction:
mscale_squared`, and l = 0 and a = 1 / (1 + 0.1 ln factor) compute `none` (src/models/deepseek2.cpp).
"""

from __future__ import annotations

import math

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.weights.gguf.architecture_keys import ArchitectureKeys

ARCHITECTURES = ("mistral4", "deepseek2")
"""llama.cpp's names of architectures with multi-head latent attention."""
_SOFTMAX = 1
_SIGMOID = 2
_GATING_NAMES = {_SOFTMAX: "softmax", _SIGMOID: "sigmoid"}
LOG_MULTIPLIER = 0.1
"""The value of yarn_log_multiplier for an mscale_all_dim of 1."""


# --- reading -----------------------------------------------------------------------------------------------------


def read_sections(keys: ArchitectureKeys, *, has_router_bias: bool) -> JsonObject:
    """Read the sections `attention`, `ffn` and `rope` of a model config, and the family.

    Args:
        keys: the keys of the file.
        has_router_bias: whether the file has tensors of router biases.

    Raises:
        ValueError: a key has a value that is not supported, or is missing.
    """
    ffn = _read_ffn(keys, has_router_bias=has_router_bias)
    attention = _read_attention(keys)
    rope, correction = _read_rope(keys)
    attention["scale_correction"] = correction
    family = "deepseek_v3" if ffn["router"]["name"] == "sigmoid" else "mistral4"
    return {"family": family, "attention": attention, "ffn": ffn, "rope": rope}


def _read_attention(keys: ArchitectureKeys) -> JsonObject:
    """Read the section `attention` without its scale correction."""
    head_dim = keys.get("attention.key_length_mla")
    rope_dim = keys.get("rope.dimension_count")
    R = keys.get("attention.kv_lora_rank")
    required = {"attention.head_count_kv": 1, "attention.key_length": R + rope_dim, "attention.value_length": R}
    for key, value in required.items():
        stated = keys.get(key, value)
        if stated != value:
            raise ValueError(f"{keys.arch}.{key} is {stated}; with attention.key_length_mla it has to be {value}; convert again")
    scaling = None
    if beta := keys.get_float("attention.temperature_scale", 0.0):
        scaling = {"beta": beta, "original_max_seq_len": keys.get("attention.temperature_length")}
    return {
        "name": "mla",
        "num_heads": keys.get("attention.head_count"),
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": R,
        "qk_nope_head_dim": head_dim - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": keys.get("attention.value_length_mla"),
        "query_scaling": scaling,
    }


def _read_ffn(keys: ArchitectureKeys, *, has_router_bias: bool) -> JsonObject:
    """Read the section `ffn`."""
    if not keys.get("expert_weights_norm", False):
        raise ValueError(f"{keys.arch}.expert_weights_norm is false, which is not supported; it has to be true")
    if layers := keys.get("nextn_predict_layers", 0):
        raise ValueError(f"{keys.arch}.nextn_predict_layers is {layers}, which is not supported; convert the model without them")
    gating = keys.get("expert_gating_func", _SOFTMAX)
    if gating not in _GATING_NAMES:
        raise ValueError(f"{keys.arch}.expert_gating_func is {gating}; supported: 1 (softmax) and 2 (sigmoid)")
    groups = keys.get("expert_group_count", 1)
    router: JsonObject = {
        "name": _GATING_NAMES[gating],
        "bias": has_router_bias,
        # llama.cpp takes 0 for no scale.
        "scale": keys.get_float("expert_weights_scale", 1.0) or 1.0,
    }
    if groups > 1:
        if gating != _SIGMOID:
            raise ValueError(f"{keys.arch}.expert_group_count is {groups}, which is supported only with a sigmoid router")
        router |= {"num_groups": groups, "groups_per_token": keys.get("expert_group_used_count")}
    else:
        keys.get("expert_group_used_count", 1)
    num_dense = keys.get("leading_dense_block_count", 0)
    dense_width = keys.get("feed_forward_length")
    return {
        "name": "moe",
        "ffn_dim": keys.get("expert_feed_forward_length"),
        "num_experts": keys.get("expert_count"),
        "experts_per_token": keys.get("expert_used_count"),
        "num_shared_experts": keys.get("expert_shared_count", 0),
        "router": router,
        "dense_layers": {"count": num_dense, "ffn_dim": dense_width} if num_dense else None,
    }


def _read_rope(keys: ArchitectureKeys) -> tuple[JsonObject, str]:
    """Return the section `rope`, and the correction of the softmax scale."""
    theta = keys.get_float("rope.freq_base", 1e4)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get_float("rope.scaling.factor", 1.0)
    if kind in ("none", "linear") and factor == 1:
        return {"name": "default", "theta": theta}, "none"
    if kind != "yarn":
        raise ValueError(f"{keys.arch}.rope.scaling is {kind} by {factor:g}; supported: none and yarn")
    attn_factor = keys.get_float("rope.scaling.attn_factor", 1.0)
    multiplier = keys.get_float("rope.scaling.yarn_log_multiplier", 0.0)
    yarn = {
        "name": "yarn",
        "theta": theta,
        "factor": factor,
        "original_max_seq_len": keys.get("rope.scaling.original_context_length", keys.get("context_length")),
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": keys.get_float("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get_float("rope.scaling.yarn_beta_slow", 1.0),
    }
    if multiplier:
        if attn_factor != 1 or not math.isclose(multiplier, LOG_MULTIPLIER, rel_tol=1e-6):
            raise ValueError(
                f"{keys.arch}.rope.scaling has yarn_log_multiplier {multiplier:g} and attn_factor {attn_factor:g}; "
                f"supported: {LOG_MULTIPLIER} and 1"
            )
        return yarn, "mscale_squared" if factor > 1 else "none"
    neutral = neutral_attn_factor(factor)
    if not math.isclose(attn_factor, neutral, rel_tol=1e-5):
        raise ValueError(
            f"{keys.arch}.rope.scaling.attn_factor is {attn_factor:g}, which scales the rotary dims; supported: {neutral:.7g}, "
            f"which cancels YaRN's own factor, or a yarn_log_multiplier of {LOG_MULTIPLIER}"
        )
    return yarn, "none"


def neutral_attn_factor(factor: float) -> float:
    """Return the attn_factor with which llama.cpp scales neither scores nor cos and sin, in the absence of a log multiplier."""
    return 1.0 if factor <= 1 else 1 / (1 + 0.1 * math.log(factor))


# --- writing -----------------------------------------------------------------------------------------------------


def architecture(model: config.Model) -> str:
    """Return llama.cpp's name of the architecture."""
    return "mistral4" if model.family == "mistral4" else "deepseek2"


def latent_keys(model: config.Model, attention: config.MultiHeadLatentAttention) -> dict[str, int | float | str | bool]:
    """Return the keys that llama.cpp reads, without the name of the architecture.

    Raises:
        ValueError: llama.cpp would compute the model differently.
    """
    ffn = model.ffn
    assert isinstance(ffn, config.MoeFfn)  # no family has latents without experts
    if attention.q_lora_rank is None:
        raise ValueError("attention.q_lora_rank is null, which llama.cpp has only for 26 or 27 layers; export with --format hf")
    R = attention.kv_lora_rank
    dense = ffn.dense_layers
    keys: dict[str, int | float | str | bool] = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_seq_len,
        "embedding_length": model.model_dim,
        "block_count": model.num_layers,
        "feed_forward_length": dense.ffn_dim if dense else ffn.ffn_dim,
        "leading_dense_block_count": dense.count if dense else 0,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.q_lora_rank,
        "attention.kv_lora_rank": R,
        "attention.key_length": R + attention.qk_rope_head_dim,
        "attention.value_length": R,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.dimension_count": attention.qk_rope_head_dim,
        "rope.freq_base": float(model.rope.theta),
        "expert_count": ffn.num_experts,
        "expert_used_count": ffn.experts_per_token,
        "expert_shared_count": ffn.num_shared_experts,
        "expert_feed_forward_length": ffn.ffn_dim,
        "expert_weights_scale": float(ffn.router.scale),
        "expert_weights_norm": True,
        "expert_gating_func": _SIGMOID if isinstance(ffn.router, config.SigmoidRouter) else _SOFTMAX,
    }
    if isinstance(ffn.router, config.SigmoidRouter) and ffn.router.num_groups > 1:
        keys |= {"expert_group_count": ffn.router.num_groups, "expert_group_used_count": ffn.router.groups_per_token}
    if isinstance(model.rope, config.YarnRope):
        keys |= _yarn_keys(model.rope, attention.scale_correction)
    if attention.query_scaling is not None:
        keys |= {
            "attention.temperature_scale": float(attention.query_scaling.beta),
            "attention.temperature_length": attention.query_scaling.original_max_seq_len,
        }
    return keys


def _yarn_keys(rope: config.YarnRope, correction: str) -> dict[str, int | float | str | bool]:
    """Return the keys of YaRN, with which llama.cpp computes the softmax scale of the config."""
    if rope.mscale != rope.mscale_all_dim or not rope.mscale:
        raise ValueError(
            f"rope.mscale {rope.mscale} and rope.mscale_all_dim {rope.mscale_all_dim} scale the rotary dims, which llama.cpp does "
            "not do for multi-head latent attention; export to another format"
        )
    keys: dict[str, int | float | str | bool] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_max_seq_len,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }
    if correction == "none":
        return keys | {"rope.scaling.attn_factor": neutral_attn_factor(rope.factor)}
    if rope.mscale_all_dim != 1:
        raise ValueError(f"rope.mscale_all_dim is {rope.mscale_all_dim}; llama.cpp assumes 1; export to another format")
    return keys | {"rope.scaling.yarn_log_multiplier": LOG_MULTIPLIER}
