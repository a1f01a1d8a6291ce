"""The audio tower of Voxtral, Whisper's encoder, and its projector: sizes and tensors in both layouts.

Sources: `modeling_voxtral.py` and `convert_voxtral_weights_to_hf.py` of transformers; `voxtral.py` and `configs/mistral.py` of
vLLM for Mistral's own layout. The rows of queries and keys have the same order in both, since the encoder has no rotary positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moe_train.config import Positive
from moe_train.machine.files import JsonObject
from moe_train.weights.wrappers.tower_tensor import TowerTensor

NATIVE_PREFIX = "mm_whisper_embeddings."
"""First part of the names of an audio tower and its projector in Mistral's own layout."""
POSITIONS = "audio_tower.embed_positions.weight"
"""Name of the position embeddings in Hugging Face's layout; readers of Mistral's own layout compute them."""
_LONGEST_PERIOD = 10_000
"""Ratio of the longest to the shortest period of the position embeddings."""
SECTION = "multimodal.whisper_model_args"
"""Key of params.json that describes an audio tower."""


class WhisperSettings(BaseModel):
    """Sizes of an audio tower and its projector; the defaults are those of transformers' VoxtralEncoderConfig."""

    model_config = ConfigDict(extra="ignore", strict=True)

    hidden_size: Positive = 1280
    intermediate_size: Positive = 5120
    num_hidden_layers: NonNegativeInt = 32
    num_attention_heads: Positive = 20
    num_mel_bins: Positive = 128
    max_source_positions: Positive = 1500
    activation_function: str = "gelu"
    scale_embedding: bool = False
    # Of the projector.
    text_dim: Positive
    projector_inputs: Positive
    """Width of the frames that are concatenated to one input of the projector."""


# transformers' older names of the sizes of Whisper.
_ALIASES = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
}


def settings_of(section: JsonObject, text_dim: int) -> WhisperSettings:
    """Return the sizes that the section `audio_config` of a config.json states.

    Raises:
        pydantic.ValidationError: a size is not a positive number.
    """
    stated = {_ALIASES.get(key, key): value for key, value in section.items()}
    # transformers concatenates as many frames as fill the width of the feed-forward layers, four in Whisper.
    width = stated.get("intermediate_size", WhisperSettings.model_fields["intermediate_size"].default)
    return WhisperSettings.model_validate({**stated, "text_dim": text_dim, "projector_inputs": width})


_NATIVE_SIZES = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}
"""Keys of `encoder_args` in params.json, all of which vLLM requires, and the sizes that they state."""


def native_settings(params: JsonObject, text_dim: int) -> WhisperSettings:
    """Return the sizes that `multimodal.whisper_model_args` of a params.json states.

    Raises:
        ValueError: a size is missing or is not a positive number, or the tower is that of a model that transcribes a stream.
    """
    encoder = native_section(params, "encoder_args")
    if encoder.get("causal"):
        raise ValueError(
            f"{SECTION}.encoder_args.causal is true: the encoder of a realtime model, whose text model also depends on the delay; "
            "supported: the audio towers of Voxtral Mini and Small (2507)"
        )
    mel = native_section(params, "encoder_args", "audio_encoding_args")
    downsampling = native_section(params, "downsample_args")
    stated = {name: _whole_number(encoder, "encoder_args", key) for key, name in _NATIVE_SIZES.items()}
    stated["num_mel_bins"] = _whole_number(mel, "encoder_args.audio_encoding_args", "num_mel_bins")
    if encoder.get("max_source_positions") is not None:
        stated["max_source_positions"] = _whole_number(encoder, "encoder_args", "max_source_positions")
    stated["projector_inputs"] = stated["hidden_size"] * _whole_number(downsampling, "downsample_args", "downsample_factor")
    try:
        return WhisperSettings.model_validate({**stated, "text_dim": text_dim})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{SECTION}: {first['loc'][0]} is {first['input']!r}: {first['msg']}") from error


def native_section(params: JsonObject, *keys: str) -> JsonObject:
    """Return a section inside `multimodal.whisper_model_args` of a params.json. Raises ValueError if there is none."""
    section = params
    path = (*SECTION.split("."), *keys)
    for i, key in enumerate(path):
        inner = section.get(key)
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path[: i + 1])} is {inner!r}, but it has to be an object; restore the file")
        section = inner
    return section


def _whole_number(section: JsonObject, name: str, key: str) -> int:
    """Return a size that must be stated. Raises ValueError."""
    value = section.get(key)
    if value is None:
        raise ValueError(f"{SECTION}.{name}.{key} is not stated; add it")
    if type(value) is not int:
        raise ValueError(f"{SECTION}.{name}.{key} is {value!r}; it has to be a whole number")
    return value


def tensors(settings: WhisperSettings) -> Iterator[TowerTensor]:
    """Yield every tensor of the tower and the projector."""
    D = settings.hidden_size
    F = settings.intermediate_size
    T = settings.text_dim
    encoder = f"{NATIVE_PREFIX}whisper_encoder."
    for i, channels in enumerate((settings.num_mel_bins, D)):
        name = f"audio_tower.conv{i + 1}"
        native = f"{encoder}conv_layers.{i}"
        yield TowerTensor(f"{name}.weight", (D, channels, 3), f"{native}.weight")
        yield TowerTensor(f"{name}.bias", (D,), f"{native}.bias")
    yield TowerTensor(POSITIONS, (settings.max_source_positions, D))
    linears = (
        ("self_attn.q_proj", "attention.wq", D, D),
        ("self_attn.k_proj", "attention.wk", D, D),
        ("self_attn.v_proj", "attention.wv", D, D),
        ("self_attn.out_proj", "attention.wo", D, D),
        ("fc1", "feed_forward.w1", F, D),
        ("fc2", "feed_forward.w2", D, F),
    )
    norms = (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "ffn_norm"))
    for layer in range(settings.num_hidden_layers):
        place = f"audio_tower.layers.{layer}"
        native_place = f"{encoder}transformer.layers.{layer}"
        for name, native, outputs, inputs in linears:
            yield TowerTensor(f"{place}.{name}.weight", (outputs, inputs), f"{native_place}.{native}.weight")
            if name != "self_attn.k_proj":  # a bias of keys would cancel in the softmax
                yield TowerTensor(f"{place}.{name}.bias", (outputs,), f"{native_place}.{native}.bias")
        for name, native in norms:
            for leaf in ("weight", "bias"):
                yield TowerTensor(f"{place}.{name}.{leaf}", (D,), f"{native_place}.{native}.{leaf}")
    for leaf in ("weight", "bias"):
        yield TowerTensor(f"audio_tower.layer_norm.{leaf}", (D,), f"{encoder}transformer.norm.{leaf}")
    projection = f"{NATIVE_PREFIX}audio_language_projection."
    yield TowerTensor("multi_modal_projector.linear_1.weight", (T, settings.projector_inputs), f"{projection}0.weight")
    yield TowerTensor("multi_modal_projector.linear_2.weight", (T, T), f"{projection}2.weight")


class Positions:
    """Whisper's sinusoidal position embeddings (arXiv:2212.04356), computed in float64, as a float32 tensor of a file.

    transformers keeps them in its files, and in float32 whatever the dtype of the model.
    """

    name = POSITIONS
    dtype = np.dtype(np.float32)

    def __init__(self, settings: WhisperSettings) -> None:
        self.shape = (settings.max_source_positions, settings.hidden_size)

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Compute the part at `index`; () is the whole tensor."""
        length, channels = self.shape
        half = channels // 2
        # The periods of sines and cosines grow geometrically from 2 pi to 10000 times that.
        frequencies = _LONGEST_PERIOD ** (-np.arange(half) / max(1, half - 1))
        angles = np.arange(length)[:, None] * frequencies
        table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        return table.astype(self.dtype)[index]
