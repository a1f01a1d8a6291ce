"""Convert the fields of `params.json` that describe a model with multi-head latent attention (Mistral Large 3 and Small 4).

vLLM reads them (`MistralLarge3ForCausalLM`): a router whose weights are the softmax over the chosen experts, times `routed_scale`,
shared experts, and dense first layers. `yarn.apply_scale` decides whether scores are multiplied by (0.1 log(factor) + 1)^2, which
is `attention.scale_correction` here.
"""

from __future__ import annotations

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.weights.mistral.params_fields import LATENT_SIZES, Moe, Params


def family(params: Params) -> config.FamilyName:
    """Return the family of the fields. Raises ValueError if no family has them all."""
    moe = params.moe
    present: dict[config.Feature, bool] = {
        "mla": True,
        "yarn": params.yarn is not None,
        "query_scaling": params.llama_4_scaling is not None,
        "shared_experts": moe is not None and moe.num_shared_experts > 0,
        "dense_layers": moe is not None and moe.first_k_dense_replace > 0,
        "router_scale": moe is not None and moe.routed_scale != 1,
    }
    features = [feature for feature, is_present in present.items() if is_present]
    return config.family_with(features, sparse=moe is not None, file_format="mistral")


def attention(params: Params) -> JsonObject:
    """Return the section `attention` without its query scaling.

    Raises:
        ValueError: a size is missing, or two fields contradict each other.
    """
    sizes: JsonObject = {key: getattr(params, key) for key in LATENT_SIZES}
    missing = [key for key, size in sizes.items() if size is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing, which multi-head latent attention (kv_lora_rank) requires; add it")
    if params.n_kv_heads != params.n_heads:
        raise ValueError(f"n_kv_heads is {params.n_kv_heads}; with kv_lora_rank it has to be n_heads, {params.n_heads}")
    head_dim = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    if params.head_dim != head_dim:
        raise ValueError(f"head_dim is {params.head_dim}; with kv_lora_rank it has to be the sum of both qk head dims, {head_dim}")
    yarn = params.yarn
    corrects_scale = yarn is not None and yarn.apply_scale and yarn.factor > 1
    return {
        "name": "mla",
        "num_heads": params.n_heads,
        **sizes,
        "scale_correction": "mscale_squared" if corrects_scale else "none",
    }


def ffn(params: Params) -> JsonObject:
    """Return the section `ffn`."""
    moe = params.moe
    if moe is None:
        return {"name": "dense", "ffn_dim": params.hidden_dim}
    dense_layers = None
    if moe.first_k_dense_replace:
        dense_layers = {"count": moe.first_k_dense_replace, "ffn_dim": params.hidden_dim}
    return {
        "name": "moe",
        "ffn_dim": moe.expert_hidden_dim or params.hidden_dim,
        "num_experts": moe.num_experts,
        "experts_per_token": moe.num_experts_per_tok,
        "router": {"name": "softmax", "scale": moe.routed_scale},
        "num_shared_experts": moe.num_shared_experts,
        "dense_layers": dense_layers,
    }


def sizes(model: config.Model, attention: config.MultiHeadLatentAttention) -> JsonObject:
    """Return the fields of attention and feed-forward layers. Raises ValueError if vLLM has no place for them."""
    ffn = model.ffn
    assert isinstance(ffn, config.MoeFfn)  # no family has latents without experts
    if attention.q_lora_rank is None:
        raise ValueError("attention.q_lora_rank is null, for which vLLM has no native tensor names; export with --format hf")
    dense = ffn.dense_layers
    moe = Moe(
        num_experts=ffn.num_experts,
        num_experts_per_tok=ffn.experts_per_token,
        expert_hidden_dim=ffn.ffn_dim,
        first_k_dense_replace=dense.count if dense else 0,
        route_every_n=1,
        num_shared_experts=ffn.num_shared_experts,
        routed_scale=float(ffn.router.scale),
        num_expert_groups=1,
        num_expert_groups_per_tok=1,
        renorm_strategy="WEIGHTS",
        use_load_balancing_bias=False,
    )
    return {
        "head_dim": attention.qk_head_dim,
        # Readers require the width of dense layers, even of a model that has none.
        "hidden_dim": dense.ffn_dim if dense else ffn.ffn_dim,
        "n_heads": attention.num_heads,
        "n_kv_heads": attention.num_heads,
        **{key: getattr(attention, key) for key in LATENT_SIZES},
        "moe": moe,
    }


def applies_scale(attention: config.MultiHeadLatentAttention, rope: config.YarnRope) -> bool:
    """Return `yarn.apply_scale`. Raises ValueError for mscales that params.json cannot express."""
    # Two zeros would scale cos and sin, which no reader of these files does for latent attention.
    if rope.mscale != rope.mscale_all_dim or not rope.mscale:
        raise ValueError(
            f"rope.mscale {rope.mscale} and rope.mscale_all_dim {rope.mscale_all_dim} scale the rotary dims, which params.json "
            "cannot express for multi-head latent attention; use equal ones, or export with --format hf"
        )
    if attention.scale_correction == "none":
        return False
    if rope.mscale_all_dim != 1:
        raise ValueError(
            f"rope.mscale_all_dim is {rope.mscale_all_dim}; with attention.scale_correction mscale_squared, params.json can only "
            "express 1; export with --format hf"
        )
    return True
