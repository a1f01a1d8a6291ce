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

    PEFT has a conversion for Mixtral alone (`peft/utils/transformers_weight_conversion.py`). transformers keeps the experts of
    other families in fused parameters, and their routers in classes of their own.
    """
    return config.FAMILIES[model.family].hugging_face.experts == "block_sparse_moe"


def is_adaptable(path: ParameterPath, model: config.Model) -> bool:
    """Return whether PEFT can put an adapter on a weight."""
    if path.is_norm or path.is_router_bias:
        return False
    if has_linear_experts(model):
        return True
    # Dense first layers share the names of targets with the experts, so they cannot be adapted without them.
    is_in_experts_or_dense = path.is_ffn and not path.module.startswith("ffn.shared.")
    return not is_in_experts_or_dense


def leaf_of(name: str) -> str:
    """Return the end of a weight's name by which PEFT finds its module in every layer.

    This is the last component, except for shared experts, whose last component is that of dense layers too.
    """
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if "shared_experts" in parts else parts[-1]


def adaptable_pieces(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> list[names.WeightPiece]:
    """List A and B, in turn, of every weight that can have an adapter; their rank is a placeholder."""
    weights = [ParameterPath.parse(piece.path) for piece in names.weight_pieces(model)]
    modules = {path.module_path for path in weights if is_adaptable(path, model)}
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
