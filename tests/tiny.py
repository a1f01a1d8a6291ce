"""Tiny models and meshes that several test files share, so that each shape is compiled once."""

from __future__ import annotations

from typing import Any

import jax

from moe_train import config
from moe_train.machine.mesh import make_mesh

ONE = make_mesh(config.Mesh(), jax.devices()[:1])
EIGHT = make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))

SIZES: dict[str, Any] = {"vocab_size": 24, "model_dim": 8, "num_layers": 4, "max_seq_len": 32}
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6)
INTERLEAVED = ATTENTION.model_copy(update={"windows": (None, 4)})
MOE = config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2)
DENSE = config.DenseFfn(name="dense", ffn_dim=12)
MIXTRAL = config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES)
MINISTRAL = config.Model(family="ministral", attention=INTERLEAVED, ffn=DENSE, tie_embeddings=True, **SIZES)
LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.q_proj", "attention.o_proj"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0),
    )
)
