"""What files must contain of a tower and its projector that were trained, stated a second time for the proof alone."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Literal

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.proof.carried_names import converted_name
from moe_train.proof.expected_audio import audio_tensors
from moe_train.proof.expected_tensor import ExpectedTensor, interleaved
from moe_train.proof.expected_vision import vision_tensors


def read_encoder(sizes: JsonObject) -> config.Encoder:
    """Return the sizes of a tower that a record of an export states."""
    kind = config.AudioEncoder if "num_mel_bins" in sizes else config.VisionEncoder
    return kind.model_validate_json(json.dumps(sizes))


def tower_tensors(
    layout: Literal["hf", "mistral"], encoder: config.Encoder, text_dim: int, trained: Container[str] | None = None
) -> list[ExpectedTensor]:
    """List the tensors of a tower and its projector that were trained, under their names in the files of a whole model.

    Args:
        layout: layout of the files.
        encoder: sizes of the tower.
        text_dim: width of the text model.
        trained: paths of the trained weights; None for all.
    """
    audio = isinstance(encoder, config.AudioEncoder)
    tensors = audio_tensors(encoder, text_dim) if isinstance(encoder, config.AudioEncoder) else vision_tensors(encoder, text_dim)
    chosen = [tensor for tensor in tensors if trained is None or tensor.parts[0].path in trained]
    if layout == "hf":
        return chosen
    native: list[ExpectedTensor] = []
    for tensor in chosen:
        # Rotary pairs of a vision tower are adjacent there, and half a head apart in Hugging Face's layout.
        is_rotary = not audio and tensor.name.endswith(("attention.q_proj.weight", "attention.k_proj.weight"))
        (part,) = tensor.parts
        parts = (part._replace(to_file=interleaved),) if is_rotary else tensor.parts
        native.append(ExpectedTensor(converted_name(tensor.name, layout, audio), tensor.shape, parts))
    return native
