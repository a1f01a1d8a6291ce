"""Tensors of the towers and projectors of multimodal models: names in both layouts, shapes, and what differs between the layouts.

Nothing here computes with a tower: it is carried from a base into exports, and the table decides whether it is complete and how
it is named. Sources: `modeling_pixtral.py`, `modeling_mistral3.py`, `modeling_llava.py` and `modeling_voxtral.py` of transformers
5.24; `PixtralForConditionalGeneration` of vLLM for Mistral's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moe_train.config import Positive, PositiveFloat
from moe_train.machine.files import JsonObject
from moe_train.weights.wrappers import whisper
from moe_train.weights.wrappers.classes import WrapperClass
from moe_train.weights.wrappers.tower_tensor import TowerTensor
from moe_train.weights.wrappers.whisper import WhisperSettings

NATIVE_PREFIXES = (
    *("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm."),
    *("mm_whisper_embeddings.whisper_encoder.", "mm_whisper_embeddings.audio_language_projection."),
)
"""Prefixes, in Mistral's own layout, of tensors that do not belong to the text model."""
QUANTIZATION_SUFFIXES = ("scale_inv", "weight_scale", "activation_scale", "input_scale", "qscale_weight", "qscale_act")
"""Ends of the names of tensors that accompany a quantized weight."""


class PixtralSettings(BaseModel):
    """Sizes of a vision tower and its projector; the defaults are those of transformers' PixtralVisionConfig."""

    model_config = ConfigDict(extra="ignore", strict=True)

    hidden_size: Positive = 1024
    intermediate_size: Positive = 4096
    num_hidden_layers: NonNegativeInt = 24
    num_attention_heads: Positive = 16
    num_channels: Positive = 3
    image_size: Positive = 1024
    patch_size: Positive = 16
    rope_theta: PositiveFloat = 10000.0
    hidden_act: str = "gelu"
    # Of the projector, which config.json states beside the tower's section.
    text_dim: Positive
    merge: NonNegativeInt = 0
    """Patches that are merged along each side of an image; 0 for a projector without a merger."""
    norm: bool = False
    """Whether the projector begins with a norm."""
    bias: bool = False
    features: Positive = 1
    """Number of layers of the tower whose outputs the projector takes."""


def settings_of(wrapper: WrapperClass, fields: JsonObject, text_dim: int) -> PixtralSettings | WhisperSettings:
    """Return the sizes of the tower and the projector that a `config.json` states.

    Raises:
        ValueError: the tower is not supported, or a size is not a positive number.
    """
    section = fields.get(wrapper.section)
    if section is None and wrapper.model_type == "mistral3":
        section = {"patch_size": 14, "image_size": 1540}  # the defaults of transformers' Mistral3Config
    if not isinstance(section, dict):
        raise ValueError(f"{wrapper.section} is {section!r}, but {wrapper.architecture} needs an object there; restore the file")
    tower_type = section.get("model_type", wrapper.tower_types[0])
    if tower_type not in wrapper.tower_types:
        raise ValueError(
            f"{wrapper.section}.model_type is {tower_type!r}; of {wrapper.architecture}, only towers of type "
            f"{' and '.join(wrapper.tower_types)} are supported"
        )
    stated = {key: value for key, value in section.items() if value is not None}
    try:
        if wrapper.encoder == "whisper":
            return whisper.settings_of(stated, text_dim)
        layer = fields.get("vision_feature_layer")
        projector: JsonObject = {
            "merge": 0 if wrapper.model_type == "llava" else fields.get("spatial_merge_size", 2),
            "norm": wrapper.model_type != "llava",
            "bias": fields.get("multimodal_projector_bias", wrapper.model_type == "llava"),
            "features": len(layer) if isinstance(layer, list) else 1,
        }
        rope = stated.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            stated["rope_theta"] = rope["rope_theta"]
        return PixtralSettings.model_validate({**stated, **projector, "text_dim": text_dim})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{wrapper.section}.{key} is {first['input']!r}: {first['msg']}") from error


def native_settings(params: JsonObject, text_dim: int) -> PixtralSettings | WhisperSettings | None:
    """Return the sizes of the tower that a `params.json` states; None if it states none.

    What is left out of a vision tower's has the defaults of vLLM, `VisionEncoderArgs` of its PixtralForConditionalGeneration.

    Raises:
        ValueError: a size is missing, or is not a positive number.
    """
    stated = params.get("vision_encoder")
    if params.get("multimodal"):
        if stated:
            raise ValueError("vision_encoder and multimodal are both stated, and no reader has both towers; keep one")
        return whisper.native_settings(params, text_dim)
    if not stated:
        return None
    if not isinstance(stated, dict):
        raise ValueError(f"vision_encoder is {stated!r}; it has to be an object")
    projector = {
        "merge": stated.get("spatial_merge_size", 1) if stated.get("mm_projector_id") == "patch_merge" else 0,
        "norm": stated.get("add_pre_mm_projector_layer_norm", False),
        "bias": stated.get("adapter_bias", True),
    }
    if missing := [key for key in _NATIVE_SIZES if stated.get(key) is None]:
        raise ValueError(f"vision_encoder.{missing[0]} is not stated; add it")
    try:
        return PixtralSettings.model_validate({**stated, **projector, "hidden_act": "silu", "text_dim": text_dim})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"vision_encoder.{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error


_NATIVE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def tower_tensors(settings: PixtralSettings | WhisperSettings) -> list[TowerTensor]:
    """List every tensor of the tower and the projector."""
    return list(_pixtral(settings) if isinstance(settings, PixtralSettings) else whisper.tensors(settings))


def _pixtral(settings: PixtralSettings) -> Iterator[TowerTensor]:
    D = settings.hidden_size
    F = settings.intermediate_size
    P = settings.patch_size
    N = settings.num_attention_heads
    yield TowerTensor("vision_tower.patch_conv.weight", (D, settings.num_channels, P, P), "vision_encoder.patch_conv.weight")
    yield TowerTensor("vision_tower.ln_pre.weight", (D,), "vision_encoder.ln_pre.weight")
    matrices = (
        ("attention.q_proj", (D, D), "attention.wq", N),
        ("attention.k_proj", (D, D), "attention.wk", N),
        ("attention.v_proj", (D, D), "attention.wv", 0),
        ("attention.o_proj", (D, D), "attention.wo", 0),
        ("feed_forward.gate_proj", (F, D), "feed_forward.w1", 0),
        ("feed_forward.up_proj", (F, D), "feed_forward.w3", 0),
        ("feed_forward.down_proj", (D, F), "feed_forward.w2", 0),
        ("attention_norm", (D,), "attention_norm", 0),
        ("ffn_norm", (D,), "ffn_norm", 0),
    )
    for layer in range(settings.num_hidden_layers):
        place = f"transformer.layers.{layer}"
        for name, shape, native, heads in matrices:
            yield TowerTensor(f"vision_tower.{place}.{name}.weight", shape, f"vision_encoder.{place}.{native}.weight", heads)
    projector = "multi_modal_projector"
    if settings.norm:
        yield TowerTensor(f"{projector}.norm.weight", (D,), "pre_mm_projector_norm.weight")
    if settings.merge:
        merger = "patch_merger.merging_layer.weight"
        yield TowerTensor(f"{projector}.{merger}", (D, settings.merge**2 * D), merger)
    T = settings.text_dim
    linears = (("linear_1", (T, D * settings.features), "w_in"), ("linear_2", (T, T), "w_out"))
    for name, shape, native in linears:
        yield TowerTensor(f"{projector}.{name}.weight", shape, f"vision_language_adapter.{native}.weight")
        if settings.bias:
            yield TowerTensor(f"{projector}.{name}.bias", (T,), f"vision_language_adapter.{native}.bias")


def check_complete(source: object, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the files have exactly the tensors of their tower and projector, scales of quantized ones aside.

    Args:
        source: the folder, for messages.
        expected: shapes by name, as the config describes the tower.
        shapes: shapes by name in the files.
    """
    missing = [name for name in expected if name not in shapes]
    if missing and not shapes:
        raise ValueError(
            f"{source} has no tensor of the tower and projector that its config describes ({len(missing)}, such as {missing[0]}); "
            "download the folder again or, if they were removed on purpose, replace the config by that of the text model alone"
        )
    if missing:
        raise ValueError(
            f"{source} lacks {missing[0]}, which its config describes ({len(missing)} tensors of the tower and projector in all); "
            "download the folder again, or correct the config"
        )
    for name, shape in shapes.items():
        if name not in expected:
            if name.endswith(QUANTIZATION_SUFFIXES):
                continue
            raise ValueError(
                f"{source} has {name}, which is not part of the tower and projector that its config describes; correct the config, "
                "or download the folder again"
            )
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{source}: {name} has the shape {tuple(shape)}, but the config describes {expected[name]}; correct the config, "
                "or download the folder again"
            )
