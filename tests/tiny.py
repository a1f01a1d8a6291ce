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
LATENT = config.MultiHeadLatentAttention(
    name="mla",
    num_heads=4,
    q_lora_rank=12,
    kv_lora_rank=14,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    query_scaling=config.QueryScaling(beta=0.1, original_max_seq_len=8),
)
"""No two of its sizes are equal, so that a mixed-up split fails."""
YARN = config.YarnRope(name="yarn", theta=1e4, factor=4.0, original_max_seq_len=8, beta_fast=2.0, beta_slow=0.5)
MISTRAL4 = config.Model(
    family="mistral4",
    vocab_size=64,
    model_dim=32,
    num_layers=3,
    attention=LATENT,
    ffn=config.MoeFfn(
        name="moe",
        ffn_dim=16,
        num_experts=8,
        experts_per_token=3,
        router=config.SoftmaxRouter(name="softmax", scale=1.7),
        num_shared_experts=2,
        dense_layers=config.DenseLayers(count=1, ffn_dim=48),
    ),
    rope=YARN,
    norm_eps=1e-3,
    max_seq_len=128,
)
DEEPSEEK_V3 = MISTRAL4.model_copy(
    update={
        "family": "deepseek_v3",
        "attention": LATENT.model_copy(update={"query_scaling": None, "scale_correction": "mscale_squared"}),
        "ffn": MISTRAL4.ffn.model_copy(
            update={"router": config.SigmoidRouter(name="sigmoid", bias=True, scale=2.5, num_groups=4, groups_per_token=2)}
        ),
    }
)
LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.q_proj", "attention.o_proj"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0),
    )
)
