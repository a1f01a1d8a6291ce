"""What a PEFT directory can contain: its files, and the adapters and whole weights in them under PEFT's names."""

from __future__ import annotations

from dataclasses import replace

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.weights import names

ADAPTER_CONFIG = "adapter_config.json"
"""Name of an adapter's file of settings."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Name of an adapter's file of tensors."""

GATE = "ffn.gate_proj"
UP = "ffn.up_proj"
DOWN = "ffn.down_proj"

ROUTER_IN_ADAPTERS = "block_sparse_moe.gate"
"""The router in the names of LoRA tensors, which PEFT renames while loading."""
ROUTER_OF_TRANSFORMERS = "mlp.gate"
"""The router's name in transformers 5, and so in modules_to_save, which PEFT does not rename."""


def has_linear_experts(model: config.Model) -> bool:
    """Return whether PEFT knows routed experts and routers of this family as linear maps, which it converts while loading.

    This is so for Mixtral alone. transformers keeps the experts of other families in fused parameters, and their routers in classes
    of their own, so that PEFT adapts them as parameters (`target_parameters`).
    """
    return config.FAMILIES[model.family].hugging_face.experts == "block_sparse_moe"


def are_parameters(path: ParameterPath, model: config.Model) -> bool:
    """Return whether PEFT adapts a weight as a parameter (`target_parameters`), although it may be that of a linear map.

    In a DeepSeek V3, PEFT takes the last names of dense layers and shared experts in `target_modules` for those of routed experts,
    whatever precedes them (`_MOE_TARGET_MODULE_MAPPING` in peft/utils/transformers_weight_conversion.py).
    """
    if isinstance(model.ffn, config.DenseFfn) or has_linear_experts(model) or not path.is_ffn:
        return False
    return path.is_router or path.is_expert(model) or model.family == "deepseek_v3"


def matrix_for_each_expert(layout: names.TensorLayout, model: config.Model) -> names.TensorLayout:
    """Return a layout with the family's names of experts and routers, and a matrix for each expert.

    Fused adapters have these names here after they are split, or before they are joined.
    """
    experts = names.hugging_face_of(model) if has_linear_experts(model) else names.hugging_face(experts="mlp")
    return replace(layout, router=experts.router, experts=experts.experts)


def is_adaptable(path: ParameterPath) -> bool:
    """Return whether PEFT can put an adapter on a weight."""
    return not path.is_norm and not path.is_router_bias


def leaf_of(name: str, model: config.Model) -> str:
    """Return the end of a weight's name by which PEFT finds its module in every layer.

    This is the last component, except for dense layers and shared experts of a model that has both, where these are the same.
    """
    parts = name.removesuffix(".weight").split(".")
    is_ambiguous = isinstance(model.ffn, config.MoeFfn) and parts[-1].endswith("_proj") and "mlp" in parts
    return ".".join(parts[-2:]) if is_ambiguous else parts[-1]


def adaptable_pieces(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> list[names.WeightPiece]:
    """List A and B, in turn, of every weight that can have an adapter; their rank is a placeholder."""
    weights = [ParameterPath.parse(piece.path) for piece in names.weight_pieces(model)]
    modules = {path.module_path for path in weights if is_adaptable(path)}
    return names.lora_pieces(model, dict.fromkeys(modules, 1), layout)


def saved_pieces(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> list[names.WeightPiece]:
    """List every full weight that modules_to_save can contain. Experts are excluded: transformers 5 fuses them into one module."""
    table = []
    for piece in names.weight_pieces(model, layout):
        is_expert = len(piece.lead) == 2
        if not is_expert:
            name = piece.name.replace(f"{ROUTER_IN_ADAPTERS}.", f"{ROUTER_OF_TRANSFORMERS}.")
            table.append(replace(piece, name=f"base_model.model.{name}"))
    if model.tie_embeddings:
        table.append(tied_head(model, layout))
    return table


def tied_head(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> names.WeightPiece:
    """Return the second name under which PEFT writes a tied embedding table."""
    (embed,) = (piece for piece in names.weight_pieces(model, layout) if piece.path == "embed.weight")
    return replace(embed, name=f"base_model.model.{layout.head.name}")
