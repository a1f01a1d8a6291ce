"""Fields of `config.json` for models with multi-head latent attention: attention, softmax scale and feed-forward layers.

transformers multiplies attention scores by mscale(factor, mscale_all_dim)^2 if mscale_all_dim is not 0, and cos and sin by
attention_factor or, without one, by mscale(factor, mscale) / mscale(factor, mscale_all_dim), or mscale(factor, 1) unless both
are stated; mscale(f, m) = 0.1 m ln f + 1.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

from moe_train import config
from moe_train.machine.files import JsonObject

log = logging.getLogger(__name__)


def require(fields: JsonObject, key: str) -> Any:
    """Return the value of a field. Raises ValueError if it is missing or null."""
    if fields.get(key) is None:
        raise ValueError(f"{key} is not stated, and its default differs between versions of the library; add it")
    return fields[key]


# --- reading -----------------------------------------------------------------------------------------------------


def read_attention(fields: JsonObject, query_scaling: JsonObject | None, scale_correction: str) -> JsonObject:
    """Return the section `attention`.

    Args:
        fields: fields of config.json.
        query_scaling: the section `query_scaling`, which rope_parameters states.
        scale_correction: as `read_scale` returns it.

    Raises:
        ValueError: a field is missing, or contradicts another one.
    """
    num_heads = require(fields, "num_attention_heads")
    if fields.get("num_key_value_heads") not in (None, num_heads):
        raise ValueError(f"num_key_value_heads is {fields['num_key_value_heads']}; state {num_heads}, like num_attention_heads")
    section = {key: require(fields, key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    if "q_lora_rank" not in fields:
        raise ValueError("q_lora_rank is not stated (null: queries without a latent); add it")
    head_dim = section["qk_nope_head_dim"] + section["qk_rope_head_dim"]
    # transformers derives both: `head_dim` is that of the rotary part in some classes.
    if fields.get("qk_head_dim") not in (None, head_dim):
        raise ValueError(f"qk_head_dim is {fields['qk_head_dim']}, but qk_nope_head_dim + qk_rope_head_dim is {head_dim}")
    if fields.get("head_dim") not in (None, head_dim, section["qk_rope_head_dim"]):
        raise ValueError(f"head_dim is {fields['head_dim']}, neither qk_head_dim {head_dim} nor qk_rope_head_dim; remove it")
    return {
        "name": "mla",
        "num_heads": num_heads,
        "q_lora_rank": fields["q_lora_rank"],
        **section,
        "query_scaling": query_scaling,
        "scale_correction": scale_correction,
    }


def read_scale(fields: JsonObject, rope_fields: JsonObject) -> tuple[str, JsonObject]:
    """Return how transformers scales scores, and the fields of rope without those that only say so.

    Args:
        fields: fields of config.json.
        rope_fields: its rope_parameters, or the older rope_scaling.

    Returns:
        `attention.scale_correction`, and rope_parameters with `mscale` and `mscale_all_dim` that give the same cos and sin.

    Raises:
        ValueError: a combination is not implemented.
    """
    rope = dict(rope_fields)
    partial = rope.pop("partial_rotary_factor", None)
    head_dim = require(fields, "qk_nope_head_dim") + require(fields, "qk_rope_head_dim")
    if partial not in (None, 1) and round(head_dim * partial) != fields["qk_rope_head_dim"]:
        raise ValueError(f"rope_parameters.partial_rotary_factor is {partial}, not qk_rope_head_dim / qk_head_dim; remove it")
    attention_factor = rope.pop("attention_factor", None)
    if rope.get("rope_type", rope.get("type", "default")) != "yarn":
        if attention_factor is not None:
            raise ValueError("rope_parameters.attention_factor has no meaning without yarn; remove it")
        return "none", rope
    mscale = float(rope.get("mscale") or 0)
    all_dim = float(rope.get("mscale_all_dim") or 0)
    correction = "mscale_squared" if all_dim and float(require(rope, "factor")) > 1 else "none"
    if attention_factor is not None:
        mscale, all_dim = _mscales(float(attention_factor), float(rope["factor"]), all_dim)
    return correction, {**rope, "mscale": mscale, "mscale_all_dim": all_dim}


def _mscales(attention_factor: float, factor: float, all_dim: float) -> tuple[float, float]:
    """Return the mscale and mscale_all_dim that give this factor on cos and sin; mscale_all_dim is kept unless it is 0."""
    if math.isclose(attention_factor, 1.0, rel_tol=1e-6):
        return all_dim or 1.0, all_dim or 1.0
    if math.isclose(attention_factor, 0.1 * math.log(factor) + 1, rel_tol=1e-6):
        return 0.0, all_dim
    raise ValueError(f"rope_parameters.attention_factor is {attention_factor}, which is not implemented; it has to be 1.0")


@functools.cache
def warn_of_scale(source: str, factor: float, all_dim: float) -> None:
    """Warn, once for each file, that other readers of the same model scale its scores differently."""
    log.warning(
        "%s states mscale_all_dim %g, so transformers multiplies the attention scores by %.4f, and so does training "
        "(attention.scale_correction: mscale_squared); vLLM and SGLang serve the native files of Mistral's models without this "
        "factor; state model with scale_correction: none to train as these serve",
        source,
        all_dim,
        (0.1 * all_dim * math.log(factor) + 1) ** 2,
    )


def read_ffn(family: config.FamilyName, fields: JsonObject) -> JsonObject:
    """Return the section `ffn`. Raises ValueError if a field is missing or not implemented."""
    groups = (fields.get("n_group") or 1, fields.get("topk_group") or 1)
    scale = float(require(fields, "routed_scaling_factor"))
    router: JsonObject = {"name": "softmax", "scale": scale}
    if family == "deepseek_v3":
        router = {"name": "sigmoid", "bias": True, "scale": scale}
        # As many groups as a token keeps limit nothing.
        if groups[0] != groups[1]:
            router |= {"num_groups": groups[0], "groups_per_token": groups[1]}
    elif groups[0] != groups[1]:
        raise ValueError(f"n_group is {groups[0]} and topk_group {groups[1]}, but {family} has no groups here; state 1")
    ffn: JsonObject = {
        "name": "moe",
        "ffn_dim": require(fields, "moe_intermediate_size"),
        "num_experts": require(fields, "n_routed_experts" if "n_routed_experts" in fields else "num_local_experts"),
        "experts_per_token": require(fields, "num_experts_per_tok"),
        "num_shared_experts": require(fields, "n_shared_experts"),
        "router": router,
    }
    if num_dense := require(fields, "first_k_dense_replace"):
        ffn["dense_layers"] = {"count": num_dense, "ffn_dim": require(fields, "intermediate_size")}
    return ffn


# --- writing -----------------------------------------------------------------------------------------------------


def write_fields(model: config.Model, attention: config.MultiHeadLatentAttention, ffn: config.MoeFfn) -> JsonObject:
    """Return the fields that only models with latent attention have, or that mean something else for them."""
    router = ffn.router
    num_groups, groups_per_token = 1, 1
    if isinstance(router, config.SigmoidRouter):
        num_groups, groups_per_token = router.num_groups, router.groups_per_token
    dense = ffn.dense_layers
    fields: JsonObject = {
        # Without dense layers the field has no effect.
        "intermediate_size": ffn.ffn_dim if dense is None else dense.ffn_dim,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "head_dim": attention.qk_head_dim if model.family == "mistral4" else attention.qk_rope_head_dim,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "qk_head_dim": attention.qk_head_dim,
        "v_head_dim": attention.v_head_dim,
        "first_k_dense_replace": 0 if dense is None else dense.count,
        "moe_intermediate_size": ffn.ffn_dim,
        "n_routed_experts": ffn.num_experts,
        "n_shared_experts": ffn.num_shared_experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "n_group": num_groups,
        "topk_group": groups_per_token,
        "routed_scaling_factor": router.scale,
        "output_router_logits": False,
    }
    if model.family == "deepseek_v3":
        fields["num_nextn_predict_layers"] = 0  # transformers' default is a further layer
    return fields


def write_scale(model: config.Model, attention: config.MultiHeadLatentAttention, rope: config.YarnRope) -> JsonObject:
    """Return the fields of rope_parameters with which transformers computes the trained scale of scores.

    Raises:
        ValueError: no fields give the same cos and sin.
    """
    fields: JsonObject = {}
    if model.family == "mistral4":
        fields["partial_rotary_factor"] = _partial_rotary_factor(attention)
    if attention.scale_correction == "mscale_squared":
        return {**fields, "mscale": float(rope.mscale), "mscale_all_dim": float(rope.mscale_all_dim)}
    # A truthy mscale_all_dim would correct the scale, so the factor on cos and sin has to be stated itself.
    factor = {(1.0, 1.0): 1.0, (0.0, 0.0): 0.1 * math.log(max(rope.factor, 1.0)) + 1}.get((rope.mscale, rope.mscale_all_dim))
    if factor is None:
        raise ValueError(
            f"rope.mscale {rope.mscale} and rope.mscale_all_dim {rope.mscale_all_dim} with attention.scale_correction none; "
            "a config.json can state 1 and 1, or 0 and 0"
        )
    return {**fields, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": factor}


def _partial_rotary_factor(attention: config.MultiHeadLatentAttention) -> float:
    """Return the share of rotary dims, of which transformers takes int(head_dim * share) as their number."""
    share = attention.qk_rope_head_dim / attention.qk_head_dim
    # The product may be below the integer by a rounding.
    while int(attention.qk_head_dim * share) < attention.qk_rope_head_dim:
        share = math.nextafter(share, 1.0)
    return share
