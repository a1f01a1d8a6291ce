"""Hugging Face's layouts: the names that transformers gives to the tensors of each family, in files and in memory.

Of the layouts of a Mixtral the per-expert one is written, which transformers 4 and 5, vLLM and llama.cpp read. transformers 5's
fused experts are only read there, while they are the only layout of a Mistral 4. The prefixes of a text model inside a vision
wrapper are only read.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import assert_never

from moe_train import config
from moe_train.weights.names.tensor_layout import Row, TensorLayout


def hugging_face(body: str = "model.", head: str = "", experts: config.HuggingFaceExperts = "block_sparse_moe") -> TensorLayout:
    """Build a variant of Hugging Face's layout.

    Args:
        body: prefix of all names except the head's; the default is the one that is written.
        head: prefix of the head's name; the default is the one that is written.
        experts: how routed experts are stored.
    """
    routed: tuple[Row, ...]
    match experts:
        case "fused":
            router = "mlp.gate.weight"
            routed = (
                # Two rows share a tensor: its rows 0 to F - 1 are the gate, F to 2F - 1 the up projection. The names have no
                # `.weight`.
                Row("mlp.experts.gate_up_proj", "F D", "ffn.gate_proj.weight", "D F", "gate of gate_up"),
                Row("mlp.experts.gate_up_proj", "F D", "ffn.up_proj.weight", "D F", "up of gate_up"),
                Row("mlp.experts.down_proj", "D F", "ffn.down_proj.weight", "F D", "experts"),
            )
        case "block_sparse_moe":
            router = "block_sparse_moe.gate.weight"
            # Mixtral's numbers: w1 is the gate (to which silu applies), w3 the up and w2 the down projection.
            routed = _swiglu("block_sparse_moe.experts.{e}.", ("w1", "w3", "w2"))
        case "mlp":
            router = "mlp.gate.weight"
            routed = _swiglu("mlp.experts.{e}.", ("gate_proj", "up_proj", "down_proj"))
        case _:
            assert_never(experts)
    return TensorLayout(
        file_format="hf",
        embed=Row(f"{body}embed_tokens.weight", "V D", "embed.weight", "V D"),
        norm=Row(f"{body}norm.weight", "D", "final_norm.scale", "D"),
        head=Row(f"{head}lm_head.weight", "V D", "head.weight", "V D"),
        layer=f"{body}layers.{{l}}.",
        norms=(
            Row("input_layernorm.weight", "D", "attention_norm.scale", "D"),
            # Hugging Face names this norm after what precedes it; it normalizes the input of the feed-forward part.
            Row("post_attention_layernorm.weight", "D", "ffn_norm.scale", "D"),
        ),
        grouped_query=(
            Row("self_attn.q_proj.weight", "NH D", "attention.q_proj.weight", "D N H"),
            Row("self_attn.k_proj.weight", "KH D", "attention.k_proj.weight", "D K H"),
            Row("self_attn.v_proj.weight", "KH D", "attention.v_proj.weight", "D K H"),
            Row("self_attn.o_proj.weight", "D NH", "attention.o_proj.weight", "N H D"),
        ),
        # Rotary pairs are adjacent in these files and in our latent attention alike.
        latent=(
            Row("self_attn.q_proj.weight", "NH D", "attention.q_proj.weight", "D N H"),
            Row("self_attn.q_a_proj.weight", "Q D", "attention.q_a_proj.weight", "D Q"),
            Row("self_attn.q_a_layernorm.weight", "Q", "attention.q_a_norm.scale", "Q"),
            Row("self_attn.q_b_proj.weight", "NH Q", "attention.q_b_proj.weight", "Q N H"),
            Row("self_attn.kv_a_proj_with_mqa.weight", "C D", "attention.kv_a_proj.weight", "D C"),
            Row("self_attn.kv_a_layernorm.weight", "R", "attention.kv_a_norm.scale", "R"),
            Row("self_attn.kv_b_proj.weight", "NU R", "attention.kv_b_proj.weight", "R N U"),
            Row("self_attn.o_proj.weight", "D NW", "attention.o_proj.weight", "N W D"),
        ),
        dense=_swiglu("mlp.", ("gate_proj", "up_proj", "down_proj")),
        router=Row(router, "E D", "ffn.router.weight", "D E"),
        router_bias=Row("mlp.gate.e_score_correction_bias", "E", "ffn.router.bias", "E"),
        shared=(
            Row("mlp.shared_experts.gate_proj.weight", "S D", "ffn.shared.gate_proj.weight", "D S"),
            Row("mlp.shared_experts.up_proj.weight", "S D", "ffn.shared.up_proj.weight", "D S"),
            Row("mlp.shared_experts.down_proj.weight", "D S", "ffn.shared.down_proj.weight", "S D"),
        ),
        experts=routed,
        adapters=("base_model.model.{stem}.lora_A.weight", "base_model.model.{stem}.lora_B.weight"),
        scores=Row("score.weight", "Y D", "head.weight", "Y D"),
        adapters_of_embed=("base_model.model.{stem}.lora_embedding_A", "base_model.model.{stem}.lora_embedding_B"),
    )


def _swiglu(prefix: str, leaves: tuple[str, str, str]) -> tuple[Row, ...]:
    """Return the rows of gate, up and down projection.

    Args:
        prefix: what the names begin with.
        leaves: names of the three matrices.
    """
    gate, up, down = leaves
    return (
        Row(f"{prefix}{gate}.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row(f"{prefix}{up}.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row(f"{prefix}{down}.weight", "D F", "ffn.down_proj.weight", "F D"),
    )


HUGGING_FACE = hugging_face()
"""The layout that is written for Hugging Face, except for families with other names of experts (`hugging_face_of`)."""
_BODIES = (("model.language_model.", ""), ("language_model.model.", "language_model."), ("model.", ""))
"""Prefixes of body and head of a text model: inside a vision wrapper in memory, in its files, and alone."""
WRAPPED = hugging_face("model.language_model.")
"""The names that transformers 5 gives to the text model inside a vision wrapper, and so the names of its adapters."""

OUTSIDE_TEXT = ("vision_tower.", "multi_modal_projector.", "audio_tower.")
"""Parts of the names of the tensors of a multimodal model that do not belong to its text model."""
RECOMPUTED = (".rotary_emb.inv_freq",)
"""Parts of the names of tensors that every reader computes from config.json, so that nothing is lost without them."""


def hugging_face_of(model: config.Model) -> TensorLayout:
    """Return the layout that is written for Hugging Face for models of this family."""
    return hugging_face(experts=config.FAMILIES[model.family].hugging_face.experts)


def wrapped_in_files(model: config.Model) -> TensorLayout:
    """Return the names of the text model in the files of a multimodal model, as transformers saves it."""
    return hugging_face("language_model.model.", "language_model.", config.FAMILIES[model.family].hugging_face.experts)


def detect_hugging_face(names: Collection[str]) -> TensorLayout:
    """Detect the variant of Hugging Face's layout from the tensor names of a file."""
    # Without an embedding, check_file_tensors reports what is missing under the names of a text model alone.
    body = next((prefix for prefix in _BODIES if f"{prefix[0]}embed_tokens.weight" in names), _BODIES[-1])
    experts: config.HuggingFaceExperts = "block_sparse_moe"
    if any(name.endswith("mlp.experts.gate_up_proj") for name in names):
        experts = "fused"
    elif any(".mlp.experts.0." in name for name in names):
        experts = "mlp"
    return hugging_face(*body, experts)


def detect_adapted(names: Collection[str], model: config.Model) -> TensorLayout:
    """Detect from the names of a PEFT file whether its base is a text model or a vision wrapper.

    Args:
        names: names of the file's tensors.
        model: the architecture of the text model.
    """
    experts = config.FAMILIES[model.family].hugging_face.experts
    # Without the last one, `model.`, which the names inside a wrapper can begin with too.
    for body, head in _BODIES[:-1]:
        prefix, _ = HUGGING_FACE.adapters[0].split("{stem}")
        if any(name.startswith(prefix + body) for name in names):
            return hugging_face(body, head, experts)
    return hugging_face(experts=experts)
