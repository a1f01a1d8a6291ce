"""Models of every kind that Mistral's own layout can express, and how one is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_train import config
from moe_train.machine.files import new_directory
from moe_train.weights import merge as merging
from moe_train.weights import mistral
from tests.tiny import ATTENTION, DENSE, MINISTRAL, MIXTRAL, SIZES

YARN = config.YarnRope(name="yarn", theta=1e4, factor=4.0, original_max_seq_len=8, beta_fast=4.0)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8)})
MODELS = {
    "mixtral": MIXTRAL,
    "mistral": config.Model(
        family="mistral", attention=ATTENTION.model_copy(update={"windows": (4,)}), ffn=DENSE, norm_eps=1e-6, **SIZES
    ),
    "ministral": MINISTRAL.model_copy(update={"tie_embeddings": False}),
    "ministral3": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES),
    "scaled yarn": config.Model(
        family="ministral3",
        attention=ATTENTION,
        ffn=DENSE,
        rope=YARN.model_copy(update={"mscale": 0.0, "mscale_all_dim": 0.0}),
        **SIZES,
    ),
}

LATENT = config.MultiHeadLatentAttention(
    name="mla",
    num_heads=4,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    query_scaling=config.QueryScaling(beta=0.1, original_max_seq_len=8),
)
MISTRAL4 = config.Model(
    family="mistral4",
    attention=LATENT,
    ffn=config.MoeFfn(
        name="moe",
        ffn_dim=12,
        num_experts=4,
        experts_per_token=2,
        router=config.SoftmaxRouter(name="softmax", scale=1.7),
        num_shared_experts=2,
        dense_layers=config.DenseLayers(count=1, ffn_dim=20),
    ),
    rope=YARN,
    norm_eps=1e-6,
    **SIZES,
)
"""All sizes of MLA differ, so that no split of a dim can be confused with another."""


def write(parameters: Mapping[str, jax.Array], model: config.Model, out: Path, dtype: Any = "float32") -> Path:
    with new_directory(out) as directory:
        mistral.write(
            directory, model, dtype, lambda piece: piece.to_file(merging.merged(parameters, None, piece, np.dtype(dtype)))
        )
    return out
