"""An audio wrapper (Voxtral) around a text model in files, and clips of tones to hear through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.weights import hf, names
from moe_train.weights.wrappers import whisper
from tests.commands.wrapper import TEXT

RATE = 16_000
SIZES: dict[str, int] = {
    **{"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_mel_bins": 8, "max_source_positions": 16},
}
AUDIO: dict[str, Any] = {
    **{"sampling_rate": RATE, "frame_rate": 12.5, "chunk_length_s": 0.32},
    "audio_encoding_config": {"num_mel_bins": 8, "hop_length": 160, "window_size": 400},
}
"""Section `audio` of a tekken.json: chunks of 0.32 s, which are 32 frames, 16 positions and 4 tokens."""
ENCODER = config.AudioEncoder(tower_dim=16, ffn_dim=64, num_layers=1, num_heads=2, num_mel_bins=8, max_positions=16, downsampling=4)
# Llama's text models have no sliding window and no bias, as those of the tests.
MODEL = TEXT.model_copy(update={"family": "llama", "vocab_size": 1280})


def save_audio_wrapper(directory: Path, weights: Parameters, model: config.Model = MODEL) -> None:
    """Save the text model of `weights` in a VoxtralForConditionalGeneration with a random tower."""
    directory.mkdir()
    text = hf.write_model_config(model, dtype="float32", bos_token_id=1, eos_token_id=2)
    fields = {"architectures": ["VoxtralForConditionalGeneration"], "model_type": "voxtral", "text_config": text}
    fields |= {"audio_config": {"model_type": "voxtral_encoder", **SIZES}, "audio_token_id": 24}
    (directory / "config.json").write_text(json.dumps(fields))
    settings = whisper.settings_of(SIZES, model.model_dim)
    draw = np.random.default_rng(7).normal
    tensors: dict[str, np.ndarray] = {}
    for tensor in whisper.tensors(settings):
        tensors[tensor.name] = draw(0, 0.2, tensor.shape).astype(np.float32)
        if "norm.weight" in tensor.name:
            tensors[tensor.name] += 1
    tensors[whisper.POSITIONS] = whisper.Positions(settings).read()
    for piece in names.weight_pieces(model, names.wrapped_in_files(model)):
        tensors[piece.name] = np.ascontiguousarray(piece.to_file(np.asarray(weights[piece.path])[piece.lead]))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def tone(hertz: float, seconds: float, seed: int = 0) -> np.ndarray:
    """A sine with a little noise, as 16-bit samples."""
    samples = np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)
    return ((samples * 0.5 + np.random.default_rng(seed).normal(0, 0.01, len(samples))) * 32767).astype("<i2")


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1) -> bytes:
    """A WAV file of 16-bit samples."""
    data = samples.astype("<i2").tobytes()
    header = b"fmt " + (16).to_bytes(4, "little") + b"".join(
        number.to_bytes(size, "little")
        for number, size in ((1, 2), (channels, 2), (rate, 4), (rate * channels * 2, 4), (channels * 2, 2), (16, 2))
    )  # fmt: skip
    content = b"WAVE" + header + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(content).to_bytes(4, "little") + content
