"""The vision tower of Pixtral in files: its sizes, and the place of every matrix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_train import config
from moe_train.weights.names.pieces import WeightPiece, piece_of
from moe_train.weights.names.tensor_layout import Row
from moe_train.weights.on_disk import Carried
from moe_train.weights.wrappers.pixtral_settings import largest_image
from moe_train.weights.wrappers.tower_tensor import TowerRows
from moe_train.weights.wrappers.towers import PixtralSettings

_COLOURS = 3
_NATIVE_NORM_EPS = 1e-5
"""Constant of the projector's norm in readers of Mistral's own layout, whose files do not state it."""


def required_settings(carried: Carried) -> dict[str, tuple[object, object]]:
    """Return each setting of a tower that is computed with one value alone: key -> the files' value, the one that is computed."""
    settings = carried.settings
    assert isinstance(settings, PixtralSettings)
    required: dict[str, tuple[object, object]] = {"vision_config.num_channels": (settings.num_channels, _COLOURS)}
    if carried.layout == "hf":
        for key, only in (
            ("projector_hidden_act", "gelu"),
            ("vision_feature_layer", -1),
            ("vision_feature_select_strategy", "full"),
        ):
            required[key] = (carried.fields.get(key, only), only)
    return required


def sizes_of(carried: Carried, model: config.Model, path: Path) -> dict[str, object]:
    """Return the sizes of a tower and its projector as fields of `config.VisionEncoder`; see `encoders.encoder_of`."""
    settings = carried.settings
    assert isinstance(settings, PixtralSettings)
    is_native = carried.layout == "mistral"
    longest = carried.fields["vision_encoder"].get("max_image_size") if is_native else largest_image(path)
    return {
        "tower_dim": settings.hidden_size,
        "ffn_dim": settings.intermediate_size,
        "num_layers": settings.num_hidden_layers,
        "num_heads": settings.num_attention_heads,
        "patch_size": settings.patch_size,
        "max_image_size": longest or settings.image_size,
        "theta": settings.rope_theta,
        "activation": settings.hidden_act,
        "merge_size": settings.merge,
        "projector_norm": settings.norm,
        "projector_norm_eps": _NATIVE_NORM_EPS if is_native else model.norm_eps,
        "projector_bias": settings.bias,
    }


_OUTSIDE_LAYERS = (
    Row("vision_tower.patch_conv.weight", "D A X Y", "vision.tower.patch_proj.weight", "AXY D"),
    Row("vision_tower.ln_pre.weight", "D", "vision.tower.patch_norm.scale", "D"),
)
_IN_LAYER = (
    Row("attention_norm.weight", "D", "attention_norm.scale", "D"),
    Row("attention.q_proj.weight", "NH D", "attention.q_proj.weight", "D N H"),
    Row("attention.k_proj.weight", "NH D", "attention.k_proj.weight", "D N H"),
    Row("attention.v_proj.weight", "NH D", "attention.v_proj.weight", "D N H"),
    Row("attention.o_proj.weight", "D NH", "attention.o_proj.weight", "N H D"),
    Row("ffn_norm.weight", "D", "ffn_norm.scale", "D"),
    Row("feed_forward.gate_proj.weight", "F D", "ffn.gate_proj.weight", "D F"),
    Row("feed_forward.up_proj.weight", "F D", "ffn.up_proj.weight", "D F"),
    Row("feed_forward.down_proj.weight", "D F", "ffn.down_proj.weight", "F D"),
)
_NORM = Row("multi_modal_projector.norm.weight", "D", "vision.projector.norm.scale", "D")
_MERGER = Row("multi_modal_projector.patch_merger.merging_layer.weight", "D U", "vision.projector.merge_proj.weight", "U D")
_LINEARS = (
    Row("multi_modal_projector.linear_1.weight", "T D", "vision.projector.in_proj.weight", "D T"),
    Row("multi_modal_projector.linear_2.weight", "G T", "vision.projector.out_proj.weight", "T G"),
)
_BIASES = (
    Row("multi_modal_projector.linear_1.bias", "T", "vision.projector.in_proj.bias", "T"),
    Row("multi_modal_projector.linear_2.bias", "G", "vision.projector.out_proj.bias", "G"),
)
"""Tensors in Hugging Face's layout. Letters of dims: D width of the tower, N heads, H dims of a head, F width of its feed-forward
layers, A colours, X and Y sides of a patch, U values of merged patches, T and G width of the text model."""
_NATIVE_NAMES = (
    ("vision_tower.", "vision_encoder."),
    ("attention.q_proj", "attention.wq"),
    ("attention.k_proj", "attention.wk"),
    ("attention.v_proj", "attention.wv"),
    ("attention.o_proj", "attention.wo"),
    ("feed_forward.gate_proj", "feed_forward.w1"),
    ("feed_forward.up_proj", "feed_forward.w3"),
    ("feed_forward.down_proj", "feed_forward.w2"),
    ("multi_modal_projector.norm.", "pre_mm_projector_norm."),
    ("multi_modal_projector.patch_merger.", "patch_merger."),
    ("multi_modal_projector.linear_1", "vision_language_adapter.w_in"),
    ("multi_modal_projector.linear_2", "vision_language_adapter.w_out"),
)
"""Parts of those names, and what stands for them in Mistral's own layout."""


def pieces_of(carried: Carried, model: config.Model) -> list[WeightPiece]:
    """List every weight of a vision tower and its projector in the layout of its files.

    Args:
        carried: the tower in files (`encoders.require_tower`).
        model: the text model.
    """
    settings = carried.settings
    assert isinstance(settings, PixtralSettings)
    sizes = _sizes(settings, model.model_dim)
    table: list[WeightPiece] = []
    for row, lead in _rows(settings):
        table.append(piece_of(sizes, _native(row) if carried.layout == "mistral" else row, lead))
    return table


def rows_of(encoder: config.VisionEncoder, model: config.Model) -> TowerRows:
    """Return every tensor of a tower and its projector, given the sizes of the tower and the text model."""
    settings = _settings_of(encoder, model)
    return TowerRows(list(_rows(settings)), _sizes(settings, model.model_dim))


def _settings_of(encoder: config.VisionEncoder, model: config.Model) -> PixtralSettings:
    """Return the sizes of a tower as its files state them."""
    return PixtralSettings(
        hidden_size=encoder.tower_dim,
        intermediate_size=encoder.ffn_dim,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        patch_size=encoder.patch_size,
        text_dim=model.model_dim,
        merge=encoder.merge_size,
        norm=encoder.projector_norm,
        bias=encoder.projector_bias,
    )


def _sizes(settings: PixtralSettings, text_dim: int) -> dict[str, int]:
    """Return the sizes of dims by letter."""
    D = settings.hidden_size
    H = D // settings.num_attention_heads
    P = settings.patch_size
    sizes = {"D": D, "F": settings.intermediate_size, "N": settings.num_attention_heads, "H": H, "Z": 2, "Q": H // 2}
    return sizes | {"A": _COLOURS, "X": P, "Y": P, "U": settings.merge**2 * D, "T": text_dim, "G": text_dim}


def _rows(settings: PixtralSettings) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Yield every tensor in Hugging Face's layout, with its entry in the stacked dim of layers."""
    outside = [*_OUTSIDE_LAYERS]
    if settings.norm:
        outside.append(_NORM)
    if settings.merge:
        outside.append(_MERGER)
    outside += _LINEARS
    if settings.bias:
        outside += _BIASES
    for row in outside:
        yield row, ()
    for layer in range(settings.num_hidden_layers):
        for row in _IN_LAYER:
            name = f"vision_tower.transformer.layers.{layer}.{row.name}"
            yield row._replace(name=name, path=f"vision.tower.layers.{row.path}"), (layer,)


def _native(row: Row) -> Row:
    """Return the row of a tensor in Mistral's own layout."""
    name = row.name
    for part, native in _NATIVE_NAMES:
        name = name.replace(part, native)
    is_rotary = row.path.endswith(("q_proj.weight", "k_proj.weight"))
    if not is_rotary:
        return row._replace(name=name)
    # The two numbers of a rotary pair are adjacent there, and half a head apart in our arrays.
    return row._replace(name=name, file_dims="NQZ D", internal_dims="D N ZQ")
