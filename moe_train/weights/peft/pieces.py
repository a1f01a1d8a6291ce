"""What a PEFT directory can contain: its files, and the adapters and whole weights in them under PEFT's names."""

from __future__ import annotations

from dataclasses import replace

from moe_train import config
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


def adaptable_pieces(model: config.Model, layout: names.TensorLayout = names.HUGGING_FACE) -> list[names.WeightPiece]:
    """List A and B, in turn, of every weight that can have an adapter; their rank is a placeholder."""
    # A path that ends in `.scale` is that of a norm, which has no adapter.
    modules = {piece.path.rpartition(".")[0] for piece in names.weight_pieces(model) if not piece.path.endswith(".scale")}
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
