"""Names of the tensors of towers and projectors in both layouts, stated a second time for the proof alone."""

from __future__ import annotations

import re
from typing import Literal

from moe_train.proof.checks import Fault

POSITIONS = "audio_tower.embed_positions.weight"
"""Name of the position embeddings of audio in Hugging Face's layout; Mistral's own leaves them to its readers."""
_VISION = {
    "vision_tower.patch_conv": "vision_encoder.patch_conv",
    "vision_tower.ln_pre": "vision_encoder.ln_pre",
    **{
        f"vision_tower.transformer.layers.#.{ours}": f"vision_encoder.transformer.layers.#.{native}"
        for ours, native in (
            ("attention.q_proj", "attention.wq"),
            ("attention.k_proj", "attention.wk"),
            ("attention.v_proj", "attention.wv"),
            ("attention.o_proj", "attention.wo"),
            ("feed_forward.gate_proj", "feed_forward.w1"),
            ("feed_forward.down_proj", "feed_forward.w2"),
            ("feed_forward.up_proj", "feed_forward.w3"),
            ("attention_norm", "attention_norm"),
            ("ffn_norm", "ffn_norm"),
        )
    },
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger.merging_layer": "patch_merger.merging_layer",
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
}
"""Modules of a vision tower in Hugging Face's layout and in Mistral's own; # stands for the number of a layer."""
_ENCODER = "mm_whisper_embeddings.whisper_encoder."
_AUDIO = {
    "audio_tower.conv1": f"{_ENCODER}conv_layers.0",
    "audio_tower.conv2": f"{_ENCODER}conv_layers.1",
    **{
        f"audio_tower.layers.#.{ours}": f"{_ENCODER}transformer.layers.#.{native}"
        for ours, native in (
            ("self_attn.q_proj", "attention.wq"),
            ("self_attn.k_proj", "attention.wk"),
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.out_proj", "attention.wo"),
            ("self_attn_layer_norm", "attention_norm"),
            ("fc1", "feed_forward.w1"),
            ("fc2", "feed_forward.w2"),
            ("final_layer_norm", "ffn_norm"),
        )
    },
    "audio_tower.layer_norm": f"{_ENCODER}transformer.norm",
    "multi_modal_projector.linear_1": "mm_whisper_embeddings.audio_language_projection.0",
    "multi_modal_projector.linear_2": "mm_whisper_embeddings.audio_language_projection.2",
}
"""Modules of an audio tower likewise."""
_LAYER = re.compile(r"(?<=\.layers\.)(\d+)")
ROTATED = re.compile(r"vision_encoder\..*\.attention\.w[qk]\.weight")
"""Native names of the matrices whose rows have another order in Hugging Face's layout."""


def converted_name(name: str, layout: Literal["hf", "mistral"], audio: bool) -> str:
    """Return the name of a tensor in `layout`, given that in the other one.

    Args:
        name: name in the base, without the `model.` of names in memory.
        layout: layout of the export.
        audio: whether it belongs to an audio tower.

    Raises:
        Fault: the layout has no such tensor.
    """
    module, _, leaf = name.rpartition(".")
    number = _LAYER.search(module)
    table = _AUDIO if audio else _VISION
    if layout == "hf":
        table = {native: ours for ours, native in table.items()}
    converted = table.get(_LAYER.sub("#", module, count=1))
    if converted is None:
        raise Fault(f"{name} has no name in {'Mistral' if layout == 'mistral' else 'Hugging Face'}'s layout")
    return f"{converted.replace('#', number.group()) if number else converted}.{leaf}"
