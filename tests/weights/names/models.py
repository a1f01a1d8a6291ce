"""Models at the sizes that people have, a small one, and the layouts of files, for the tests of names."""

from __future__ import annotations

from typing import Any

import jax

from moe_train import config
from moe_train.model import parameters, transformer
from moe_train.weights import names
from tests.tiny import ONE


def attention(heads: int = 32, kv_heads: int = 8, head_dim: int = 128, **more: Any) -> config.Attention:
    return config.GroupedQueryAttention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **more)


def dense(size: int) -> config.DenseFfn:
    return config.DenseFfn(name="dense", ffn_dim=size)


def moe(size: int, experts: int = 8) -> config.MoeFfn:
    return config.MoeFfn(name="moe", ffn_dim=size, num_experts=experts, experts_per_token=2)


def model(family: Any, vocab: int, dim: int, layers: int, a: config.Attention, ffn: config.Ffn, **more: Any) -> config.Model:
    return config.Model(family=family, vocab_size=vocab, model_dim=dim, num_layers=layers, attention=a, ffn=ffn, **more)


def latent(heads: int, q: int, kv: int, nope: int, rope: int, value: int, **more: Any) -> config.MultiHeadLatentAttention:
    sizes = {"q_lora_rank": q, "kv_lora_rank": kv, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}
    return config.MultiHeadLatentAttention(name="mla", num_heads=heads, **sizes, **more)


SCALING = config.QueryScaling(beta=0.1, original_max_seq_len=8192)
YARN = config.YarnRope(name="yarn", factor=16.0, original_max_seq_len=16384)
# model, tensors in its published files, parameters
PUBLISHED = {
    "Mixtral 8x7B": (model("mixtral", 32000, 4096, 32, attention(), moe(14336)), 995, 46_702_792_704),
    "Mixtral 8x22B": (model("mixtral", 32768, 6144, 56, attention(48), moe(16384)), 1739, 140_630_071_296),
    "Mistral 7B v0.3": (model("mistral", 32768, 4096, 32, attention(), dense(14336)), 291, 7_248_023_552),
    "Mistral Nemo": (model("mistral", 131072, 5120, 40, attention(), dense(14336)), 363, 12_247_782_400),
    "Ministral 8B": (
        model("ministral", 131072, 4096, 36, attention(windows=(None, 32768, 32768, 32768)), dense(12288)),
        327,
        8_019_808_256,
    ),
    "Ministral 3 3B": (
        model("ministral3", 131072, 3072, 26, attention(), dense(9216), rope=YARN, tie_embeddings=True),
        236,
        3_429_006_336,
    ),
    # As measured on a conversion of the official files to bfloat16, without tower and projector.
    "Mistral Small 4": (
        model(
            "mistral4",
            131072,
            4096,
            36,
            latent(32, 1024, 256, 64, 64, 128, query_scaling=SCALING),
            moe(2048, 128).model_copy(update={"num_shared_experts": 1, "experts_per_token": 4}),
            rope=config.YarnRope(name="yarn", theta=1e4, factor=128.0, original_max_seq_len=8192),
        ),
        543,
        118_972_826_624,
    ),
    "DeepSeek-V3": (
        model(
            "deepseek_v3",
            129280,
            7168,
            61,
            latent(128, 1536, 512, 128, 64, 128),
            moe(2048, 256).model_copy(
                update={
                    "num_shared_experts": 1,
                    "experts_per_token": 8,
                    "router": config.SigmoidRouter(name="sigmoid", bias=True, scale=2.5, num_groups=8, groups_per_token=4),
                    "dense_layers": config.DenseLayers(count=3, ffn_dim=18432),
                }
            ),
            rope=config.YarnRope(name="yarn", theta=1e4, factor=40.0, original_max_seq_len=4096),
        ),
        45_395,
        671_026_419_200,
    ),
    "SmolLM2 135M": (model("llama", 49152, 576, 30, attention(9, 3, 64), dense(1536), tie_embeddings=True), 272, 134_515_008),
}


def shapes_of(m: config.Model) -> dict[str, tuple[int, ...]]:
    with jax.set_mesh(ONE):
        abstract = transformer.abstract_model(m, config.Compute())
    return {path: array.shape for path, array in parameters.parameters(abstract)[1].items()}


LAYOUTS = {
    "hugging face": names.HUGGING_FACE,
    "hugging face, per expert": names.hugging_face(experts="mlp"),
    "fused": names.hugging_face(experts="fused"),
    "wrapped": names.hugging_face("model.language_model.", "", experts="fused"),
    "wrapped before": names.hugging_face("language_model.model.", "language_model."),
    "mistral": names.MISTRAL,
    "gguf": names.GGUF,
}
SMALL = model("mixtral", 16, 6, 2, attention(4, 2, 6), moe(10, experts=3))


def small_files() -> dict[str, tuple[int, ...]]:
    return {piece.name: piece.shape for piece in names.weight_pieces(SMALL)}
