"""Settings of Voxtral's audio tower in config.json and in params.json, and the conversion between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.wrappers import whisper
from moe_train.weights.wrappers.classes import WRAPPERS
from moe_train.weights.wrappers.whisper import WhisperSettings

_AUDIO_TOKEN = 24
"""Id of [AUDIO] in Mistral's tokenizers."""
_SAMPLING_RATE = 16_000
_HOP_LENGTH = 160
_WINDOW_SIZE = 400
"""Samples a second, and samples between and in the windows of a spectrogram: the defaults of WhisperFeatureExtractor."""
_STRIDE = 2
"""Frames of a spectrogram for each position, since the second convolution has this stride."""
_WHISPER_VOCAB = 51_866
"""Size of Whisper's own vocabulary, which vLLM requires and nothing uses."""
_POSITIONS_TOLERANCE = 1e-3
"""Largest difference of positions that were computed in float32, besides the rounding of their dtype."""


def to_native(fields: JsonObject, settings: WhisperSettings, source: Path, control_id: Callable[[str], int | None]) -> JsonObject:
    """Return the section `multimodal` of params.json for a base in Hugging Face's layout.

    Args:
        fields: the base's config.json.
        settings: the sizes that it states.
        source: the base, whose preprocessor states how a spectrogram is computed.
        control_id: returns the id of a control token by name; None if there is no such token.

    Raises:
        ValueError: readers of params.json would compute something else.
    """
    audio_token = control_id("[AUDIO]") or _AUDIO_TOKEN
    required = {
        "audio_config.activation_function": (settings.activation_function, "gelu"),
        "audio_config.scale_embedding": (settings.scale_embedding, False),
        "projector_hidden_act": (fields.get("projector_hidden_act", "gelu"), "gelu"),
        "audio_token_id": (fields.get("audio_token_id", audio_token), audio_token),
    }
    for key, (value, only) in required.items():
        if value != only:
            raise ValueError(f"{key} is {value!r} in its config.json, and readers of Mistral's own layout only compute {only!r}")
    D = settings.hidden_size
    if settings.projector_inputs % D:
        raise ValueError(
            f"audio_config.intermediate_size {settings.projector_inputs} is no multiple of hidden_size {D}, but readers of "
            "Mistral's own layout concatenate whole frames"
        )
    extractor = _feature_extractor(source)
    return {
        "whisper_model_args": {
            "encoder_args": {
                "audio_encoding_args": {
                    "sampling_rate": extractor.get("sampling_rate", _SAMPLING_RATE),
                    "num_mel_bins": settings.num_mel_bins,
                    "hop_length": extractor.get("hop_length", _HOP_LENGTH),
                    "window_size": extractor.get("n_fft", _WINDOW_SIZE),
                },
                "dim": D,
                "n_layers": settings.num_hidden_layers,
                "head_dim": D // settings.num_attention_heads,
                "hidden_dim": settings.intermediate_size,
                "n_heads": settings.num_attention_heads,
                "vocab_size": fields["audio_config"].get("vocab_size", _WHISPER_VOCAB),
                "max_source_positions": settings.max_source_positions,
            },
            "downsample_args": {"downsample_factor": settings.projector_inputs // D},
        }
    }


def _feature_extractor(source: Path) -> JsonObject:
    """Return the settings by which the base's processor computes a spectrogram; {} if it states none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = source / name
        fields = read_object(file) if file.is_file() else {}
        # transformers 5 keeps the feature extractor inside of the processor's file.
        for section in (fields, fields.get("feature_extractor")):
            if isinstance(section, dict) and "n_fft" in section:
                return section
    return {}


def check_positions(tensor: FileTensor, settings: WhisperSettings) -> None:
    """Raise ValueError unless position embeddings are the sinusoids that readers of Mistral's own layout compute.

    Args:
        tensor: the embeddings in the base, of any float dtype.
        settings: the sizes of the tower.
    """
    stored = tensor.read().astype(np.float32)
    # Half a step of the dtype for values up to 1, on top of what computing in float32 may differ by.
    steps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
    limit = _POSITIONS_TOLERANCE + steps.get(tensor.dtype.name, 0.0)
    difference = np.abs(stored - whisper.Positions(settings).read()).max()
    if not difference <= limit:  # NaN too
        raise ValueError(
            f"{tensor.name} differs by up to {difference:.3g} from Whisper's sinusoids, but Mistral's own layout has no such "
            "tensor: its readers compute those"
        )


def to_hugging_face(
    params: JsonObject, settings: WhisperSettings, model: config.Model, control_id: Callable[[str], int | None]
) -> JsonObject:
    """Return config.json, without what describes the text model, for a base in Mistral's own layout.

    Raises:
        ValueError: transformers has no such model.
    """
    wrapper = WRAPPERS["VoxtralForConditionalGeneration"]
    if model.family not in wrapper.families():
        raise ValueError(f"{wrapper.architecture} has no text model of family {model.family}")
    if model.tie_embeddings:
        raise ValueError(f"tied_embeddings is true in its params.json, but {wrapper.architecture} has a head of its own")
    D = settings.hidden_size
    if settings.projector_inputs != settings.intermediate_size:
        raise ValueError(
            f"its projector takes {settings.projector_inputs} numbers, but that of {wrapper.architecture} takes as many as the "
            f"feed-forward layers of the tower are wide, {settings.intermediate_size}"
        )
    encoder = whisper.native_section(params, "encoder_args")
    mel = whisper.native_section(params, "encoder_args", "audio_encoding_args")
    required = {
        "encoder_args.pos_embed": (encoder.get("pos_embed"), "sinusoidal"),
        "encoder_args.sliding_window": (encoder.get("sliding_window"), None),
        "encoder_args.audio_encoding_args.global_log_mel_max": (mel.get("global_log_mel_max"), None),
    }
    for key, (value, only) in required.items():
        if value not in (None, only):
            raise ValueError(
                f"{whisper.SECTION}.{key} is {value!r} in its params.json, and {wrapper.architecture} only has {only!r}"
            )
    head_dim = encoder.get("head_dim", D // settings.num_attention_heads)
    if head_dim * settings.num_attention_heads != D:
        raise ValueError(
            f"its audio tower has {settings.num_attention_heads} heads of {head_dim} dims, but in {wrapper.architecture} all heads "
            f"together are as wide as the tower, {D}"
        )
    return {
        "architectures": [wrapper.architecture],
        "model_type": wrapper.model_type,
        "audio_token_id": control_id("[AUDIO]") or _AUDIO_TOKEN,
        "projector_hidden_act": "gelu",
        "audio_config": {
            "model_type": "voxtral_encoder",
            "activation_function": "gelu",
            "attention_dropout": 0.0,
            "head_dim": head_dim,
            "hidden_size": D,
            "initializer_range": 0.02,
            "intermediate_size": settings.intermediate_size,
            "max_source_positions": settings.max_source_positions,
            "num_attention_heads": settings.num_attention_heads,
            "num_hidden_layers": settings.num_hidden_layers,
            "num_key_value_heads": settings.num_attention_heads,
            "num_mel_bins": settings.num_mel_bins,
            "scale_embedding": False,
            "vocab_size": encoder.get("vocab_size", _WHISPER_VOCAB),
        },
    }


def processor_files(params: JsonObject, settings: WhisperSettings) -> dict[str, JsonObject]:
    """Return the processor's files for a base in Mistral's own layout, which keeps these settings in params.json."""
    mel = whisper.native_section(params, "encoder_args", "audio_encoding_args")
    sampling_rate = mel.get("sampling_rate", _SAMPLING_RATE)
    hop_length = mel.get("hop_length", _HOP_LENGTH)
    frames = settings.max_source_positions * _STRIDE
    extractor: JsonObject = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "VoxtralProcessor",
        "chunk_length": frames * hop_length // sampling_rate,
        "dither": 0.0,
        "feature_size": settings.num_mel_bins,
        "hop_length": hop_length,
        "n_fft": mel.get("window_size", _WINDOW_SIZE),
        "n_samples": frames * hop_length,
        "nb_max_frames": frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": sampling_rate,
    }
    return {"preprocessor_config.json": extractor}
