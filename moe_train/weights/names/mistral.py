"""Mistral's own layout."""

from __future__ import annotations

from dataclasses import replace

from moe_train import config
from moe_train.weights.names.tensor_layout import Row, TensorLayout

MISTRAL = TensorLayout(
    file_format="mistral",
    embed=Row("tok_embeddings.weight", "V D", "embed.weight", "V D"),
    norm=Row("norm.weight", "D", "final_norm.scale", "D"),
    head=Row("output.weight", "V D", "head.weight", "V D"),
    layer="layers.{l}.",
    norms=(
        Row("attention_norm.weight", "D", "attention_norm.scale", "D"),
        Row("ffn_norm.weight", "D", "ffn_norm.scale", "D"),
    ),
    grouped_query=(
        # rotary pairs are adjacent; ours, like Hugging Face's, are half a head apart
        Row("attention.wq.weight", "NPZ D", "attention.q_proj.weight", "D N ZP"),
        Row("attention.wk.weight", "KPZ D", "attention.k_proj.weight", "D K ZP"),
        Row("attention.wv.weight", "KH D", "attention.v_proj.weight", "D K H"),
        Row("attention.wo.weight", "D NH", "attention.o_proj.weight", "N H D"),
    ),
    # Rotary pairs are adjacent in these files and in our latent attention alike.
    latent=(
        Row("attention.wq.weight", "NH D", "attention.q_proj.weight", "D N H"),
        Row("attention.wq_a.weight", "Q D", "attention.q_a_proj.weight", "D Q"),
        Row("attention.q_a_norm.weight", "Q", "attention.q_a_norm.scale", "Q"),
        Row("attention.wq_b.weight", "NH Q", "attention.q_b_proj.weight", "Q N H"),
        Row("attention.wkv_a_with_mqa.weight", "C D", "attention.kv_a_proj.weight", "D C"),
        Row("attention.kv_a_norm.weight", "R", "attention.kv_a_norm.scale", "R"),
        Row("attention.wkv_b.weight", "NU R", "attention.kv_b_proj.weight", "R N U"),
        Row("attention.wo.weight", "D NW", "attention.o_proj.weight", "N W D"),
    ),
    dense=(
        Row("feed_forward.w1.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("feed_forward.w3.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("feed_forward.w2.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    router=Row("feed_forward.gate.weight", "E D", "ffn.router.weight", "D E"),
    router_bias=Row("gate.bias", "E", "ffn.router.bias", "E"),
    shared=(
        Row("shared_experts.w1.weight", "S D", "ffn.shared.gate_proj.weight", "D S"),
        Row("shared_experts.w3.weight", "S D", "ffn.shared.up_proj.weight", "D S"),
        Row("shared_experts.w2.weight", "D S", "ffn.shared.down_proj.weight", "S D"),
    ),
    experts=(
        Row("feed_forward.experts.{e}.w1.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("feed_forward.experts.{e}.w3.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("feed_forward.experts.{e}.w2.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    adapters=("{stem}.lora_A.weight", "{stem}.lora_B.weight"),
)
"""Mistral's own layout: consolidated.safetensors and lora.safetensors."""

_MISTRAL_LATENT = replace(
    MISTRAL,
    router=Row("gate.weight", "E D", "ffn.router.weight", "D E"),
    experts=tuple(row._replace(name=row.name.removeprefix("feed_forward.")) for row in MISTRAL.experts),
)
"""The layout of models with latent attention (Large 3, Small 4), whose experts and routers have no `feed_forward.`."""


MISTRAL_AUDIO_EMBED = "mm_whisper_embeddings.tok_embeddings.weight"
"""Name of the embeddings in a model with an audio tower, which keeps those of text and audio together."""


def mistral_of(model: config.Model, *, with_audio: bool = False) -> TensorLayout:
    """Return Mistral's own layout of models with this attention.

    Args:
        model: the text model.
        with_audio: whether it is inside a model with an audio tower.
    """
    layout = _MISTRAL_LATENT if isinstance(model.attention, config.MultiHeadLatentAttention) else MISTRAL
    return replace(layout, embed=layout.embed._replace(name=MISTRAL_AUDIO_EMBED)) if with_audio else layout
