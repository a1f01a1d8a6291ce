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
from tests import tiny
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

MISTRAL4 = tiny.MISTRAL4.model_copy(update={"norm_eps": 1e-6})
"""Readers of this layout and of GGUF have one epsilon for all norms, while transformers has 1e-6 for those of latent attention."""


def write(parameters: Mapping[str, jax.Array], model: config.Model, out: Path, dtype: Any = "float32") -> Path:
    with new_directory(out) as directory:
        mistral.write(
            directory, model, dtype, lambda piece: piece.to_file(merging.merged(parameters, None, piece, np.dtype(dtype)))
        )
    return out
