"""Models whose rows fill blocks of 32, written as GGUF files and written again with other keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_train import config
from moe_train.weights import gguf, merge, names
from moe_train.weights.gguf import container

SIZES: dict[str, Any] = {"vocab_size": 352, "model_dim": 64, "num_layers": 2, "max_seq_len": 128}
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=24)
DENSE = config.DenseFfn(name="dense", ffn_dim=96)
MOE = config.MoeFfn(name="moe", ffn_dim=96, num_experts=4, experts_per_token=2)
YARN = config.YarnRope(name="yarn", theta=1e4, factor=16.0, original_max_seq_len=8, mscale=1.0, mscale_all_dim=1.0)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8)})
MIXTRAL = config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES)
MINISTRAL3 = config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES)
WINDOWS = ATTENTION.model_copy(update={"windows": (None, 48)})
MINISTRAL = config.Model(family="ministral", attention=WINDOWS, ffn=DENSE, **SIZES)
MISTRAL = config.Model(family="mistral", attention=ATTENTION, ffn=DENSE, **SIZES)
LATENT = config.MultiHeadLatentAttention(
    name="mla",
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    query_scaling=config.QueryScaling(beta=0.1, original_max_seq_len=8),
)
SHARED = MOE.model_copy(
    update={
        "router": config.SoftmaxRouter(name="softmax", scale=1.5),
        "num_shared_experts": 2,
        "dense_layers": config.DenseLayers(count=1, ffn_dim=64),
    }
)
MISTRAL4 = config.Model(family="mistral4", attention=LATENT, ffn=SHARED, rope=YARN, norm_eps=1e-6, **SIZES)
SIGMOID = config.SigmoidRouter(name="sigmoid", bias=True, scale=2.5, num_groups=2, groups_per_token=1)
DEEPSEEK_V3 = config.Model(
    family="deepseek_v3",
    attention=LATENT.model_copy(update={"query_scaling": None, "scale_correction": "mscale_squared"}),
    ffn=SHARED.model_copy(update={"router": SIGMOID, "dense_layers": None}),
    rope=YARN,
    norm_eps=1e-6,
    **SIZES,
)
LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.[qk]_proj",), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0),
    )
)


def shapes(parameters: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for path, a in parameters.items()}


def write(
    directory: Path, model: config.Model, parameters: dict[str, jax.Array], dtype: str = "f32", tokenizer: Any = None
) -> Path:
    def matrix(piece: names.WeightPiece, dtype: np.dtype) -> np.ndarray:
        return piece.to_file(merge.merged(parameters, None, piece, dtype))

    directory.mkdir(exist_ok=True)
    gguf.write(directory, model, dtype, matrix, tokenizer)
    return directory / gguf.MODEL_FILE


def rewrite(file: Path, keys: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    typed = {k: np.uint32(v) if type(v) is int else np.float32(v) if type(v) is float else np.bool_(v) if type(v) is bool else v
             for k, v in keys.items()}  # fmt: skip
    specs = [container.GgufSpec(name, array.shape, "F32") for name, array in arrays.items()]
    container.write_gguf(file, typed, specs, lambda spec: [arrays[spec.name]])
