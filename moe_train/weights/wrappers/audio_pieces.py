"""The audio tower of Voxtral in files: its sizes, and the place of every matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moe_train import config
from moe_train.weights.names.pieces import WeightPiece, piece_of
from moe_train.weights.names.tensor_layout import Row
from moe_train.weights.on_disk import Carried, FileTensor
from moe_train.weights.wrappers import whisper
from moe_train.weights.wrappers.tower_tensor import TowerRows
from moe_train.weights.wrappers.whisper import WhisperSettings


def required_settings(carried: Carried) -> dict[str, tuple[object, object]]:
    """Return each setting of a tower that is computed with one value alone: key -> the files' value, the one that is computed."""
    settings = carried.settings
    assert isinstance(settings, WhisperSettings)
    required: dict[str, tuple[object, object]] = {
        "audio_config.activation_function": (settings.activation_function, "gelu"),
        "audio_config.scale_embedding": (settings.scale_embedding, False),
    }
    if carried.layout == "hf":
        required["projector_hidden_act"] = (carried.fields.get("projector_hidden_act", "gelu"), "gelu")
        return required
    encoder = whisper.native_section(carried.fields, "encoder_args")
    required["encoder_args.pos_embed"] = (encoder.get("pos_embed") or "sinusoidal", "sinusoidal")
    required["encoder_args.sliding_window"] = (encoder.get("sliding_window"), None)
    return required


def sizes_of(carried: Carried, model: config.Model, path: Path) -> dict[str, object]:
    """Return the sizes of a tower and its projector as fields of `config.AudioEncoder`; see `encoders.encoder_of`."""
    settings = carried.settings
    assert isinstance(settings, WhisperSettings)
    D = settings.hidden_size
    if settings.projector_inputs % D:
        raise ValueError(f"{path}: its projector takes {settings.projector_inputs} numbers, which are no whole positions of {D}")
    return {
        "tower_dim": D,
        "ffn_dim": settings.intermediate_size,
        "num_layers": settings.num_hidden_layers,
        "num_heads": settings.num_attention_heads,
        "num_mel_bins": settings.num_mel_bins,
        "max_positions": settings.max_source_positions,
        "downsampling": settings.projector_inputs // D,
    }


_OUTSIDE_LAYERS = (
    Row("audio_tower.conv1.weight", "D M W", "audio.tower.first_conv.weight", "WM D"),
    Row("audio_tower.conv1.bias", "D", "audio.tower.first_conv.bias", "D"),
    Row("audio_tower.conv2.weight", "D E W", "audio.tower.second_conv.weight", "WE D"),
    Row("audio_tower.conv2.bias", "D", "audio.tower.second_conv.bias", "D"),
    Row(whisper.POSITIONS, "S D", "audio.tower.positions", "S D"),
    Row("audio_tower.layer_norm.weight", "D", "audio.tower.norm.scale", "D"),
    Row("audio_tower.layer_norm.bias", "D", "audio.tower.norm.bias", "D"),
    Row("multi_modal_projector.linear_1.weight", "T U", "audio.projector.in_proj.weight", "U T"),
    Row("multi_modal_projector.linear_2.weight", "G T", "audio.projector.out_proj.weight", "T G"),
)
_IN_LAYER = (
    Row("self_attn_layer_norm.weight", "D", "attention_norm.scale", "D"),
    Row("self_attn_layer_norm.bias", "D", "attention_norm.bias", "D"),
    Row("self_attn.q_proj.weight", "NH D", "attention.q_proj.weight", "D N H"),
    Row("self_attn.q_proj.bias", "NH", "attention.q_proj.bias", "N H"),
    Row("self_attn.k_proj.weight", "NH D", "attention.k_proj.weight", "D N H"),
    Row("self_attn.v_proj.weight", "NH D", "attention.v_proj.weight", "D N H"),
    Row("self_attn.v_proj.bias", "NH", "attention.v_proj.bias", "N H"),
    Row("self_attn.out_proj.weight", "D NH", "attention.o_proj.weight", "N H D"),
    Row("self_attn.out_proj.bias", "D", "attention.o_proj.bias", "D"),
    Row("final_layer_norm.weight", "D", "ffn_norm.scale", "D"),
    Row("final_layer_norm.bias", "D", "ffn_norm.bias", "D"),
    Row("fc1.weight", "F D", "up_proj.weight", "D F"),
    Row("fc1.bias", "F", "up_proj.bias", "F"),
    Row("fc2.weight", "D F", "down_proj.weight", "F D"),
    Row("fc2.bias", "D", "down_proj.bias", "D"),
)
"""Tensors in Hugging Face's layout. Letters of dims: D and E width of the tower, N heads, H dims of a head, F width of its
feed-forward layers, M frequency bands, W taps of a convolution, S positions, U inputs of the projector, T and G width of the text
model."""


def pieces_of(carried: Carried, model: config.Model) -> list[WeightPiece]:
    """List every weight of an audio tower and its projector in the layout of its files.

    Args:
        carried: the tower in files (`encoders.require_tower`).
        model: the text model.
    """
    settings = carried.settings
    assert isinstance(settings, WhisperSettings)
    native = {tensor.name: tensor.native for tensor in whisper.tensors(settings)} if carried.layout == "mistral" else {}
    sizes = _sizes(settings, model.model_dim)
    table: list[WeightPiece] = []
    for row, lead in _rows(settings):
        # Positions have no name in Mistral's own layout, and are computed (`tensors_of`).
        table.append(piece_of(sizes, row._replace(name=native.get(row.name) or row.name), lead))
    return table


def rows_of(encoder: config.AudioEncoder, model: config.Model) -> TowerRows:
    """Return every tensor of a tower and its projector, given the sizes of the tower and the text model."""
    settings = WhisperSettings(
        hidden_size=encoder.tower_dim,
        intermediate_size=encoder.ffn_dim,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        num_mel_bins=encoder.num_mel_bins,
        max_source_positions=encoder.max_positions,
        text_dim=model.model_dim,
        projector_inputs=encoder.downsampling * encoder.tower_dim,
    )
    return TowerRows(list(_rows(settings)), _sizes(settings, model.model_dim))


def _sizes(settings: WhisperSettings, text_dim: int) -> dict[str, int]:
    """Return the sizes of dims by letter."""
    D = settings.hidden_size
    N = settings.num_attention_heads
    sizes = {"D": D, "E": D, "F": settings.intermediate_size, "N": N, "H": D // N, "M": settings.num_mel_bins, "W": 3}
    return sizes | {"S": settings.max_source_positions, "U": settings.projector_inputs, "T": text_dim, "G": text_dim}


def _rows(settings: WhisperSettings) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Yield every tensor in Hugging Face's layout, with its entry in the stacked dim of layers."""
    for row in _OUTSIDE_LAYERS:
        yield row, ()
    for layer in range(settings.num_hidden_layers):
        for row in _IN_LAYER:
            yield row._replace(name=f"audio_tower.layers.{layer}.{row.name}", path=f"audio.tower.layers.{row.path}"), (layer,)


def tensors_of(carried: Carried) -> Mapping[str, FileTensor]:
    """Return the tensors of an audio tower by name, with its positions, which Mistral's own layout leaves to the readers."""
    settings = carried.settings
    assert isinstance(settings, WhisperSettings)
    if carried.layout == "hf":
        return carried.tensors
    return {**carried.tensors, whisper.POSITIONS: whisper.Positions(settings)}
