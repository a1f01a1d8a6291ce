"""Settings of a Pixtral vision tower and its projector in config.json and in params.json, and the conversion between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.wrappers.classes import WrapperClass
from moe_train.weights.wrappers.towers import PixtralSettings

_IMAGE_TOKEN = 10
"""Id of [IMG] in Mistral's tokenizers, which is the default of transformers."""
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation by which mistral-common normalizes pixels (those of CLIP)."""
_PLACEHOLDER = -1
"""Value for the id of a token that is taken from the tokenizer, as in Mistral's own files."""


def to_native(fields: JsonObject, settings: PixtralSettings, source: Path, control_id: Callable[[str], int | None]) -> JsonObject:
    """Return the section `vision_encoder` of params.json for a base in Hugging Face's layout.

    Args:
        fields: the base's config.json.
        settings: the sizes that it states.
        source: the base, whose preprocessor states the largest image.
        control_id: returns the id of a control token by name; None if there is no such token.

    Raises:
        ValueError: readers of params.json would compute something else.
    """
    required = {
        "vision_config.hidden_act": (settings.hidden_act, "silu"),
        "projector_hidden_act": (fields.get("projector_hidden_act", "gelu"), "gelu"),
        "vision_feature_layer": (fields.get("vision_feature_layer", -1), -1),
        "vision_feature_select_strategy": (fields.get("vision_feature_select_strategy", "full"), "full"),
    }
    for key, (value, only) in required.items():
        if value != only:
            raise ValueError(f"{key} is {value!r} in its config.json, and readers of Mistral's own layout only compute {only!r}")
    image_token = fields.get("image_token_id", fields.get("image_token_index", _IMAGE_TOKEN))
    section: JsonObject = {
        "hidden_size": settings.hidden_size,
        "num_channels": settings.num_channels,
        "max_image_size": largest_image(source) or settings.image_size,
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "rope_theta": settings.rope_theta,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "adapter_bias": settings.bias,
        "image_token_id": image_token,
        "image_break_token_id": _or_placeholder(control_id("[IMG_BREAK]")),
        "image_end_token_id": _or_placeholder(control_id("[IMG_END]")),
    }
    if settings.norm:
        section["add_pre_mm_projector_layer_norm"] = True
    if settings.merge:
        section |= {"mm_projector_id": "patch_merge", "spatial_merge_size": settings.merge}
    return section


def _or_placeholder(number: int | None) -> int:
    return _PLACEHOLDER if number is None else number


def largest_image(source: Path) -> int | None:
    """Return the longest side, in pixels, to which the base's processor shrinks images; None if it states none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = source / name
        fields = read_object(file) if file.is_file() else {}
        # transformers 5 keeps the image processor inside of the processor's file.
        for section in (fields, fields.get("image_processor")):
            size = section.get("size") if isinstance(section, dict) else None
            if isinstance(size, dict) and isinstance(size.get("longest_edge"), int):
                return size["longest_edge"]
    return None


def to_hugging_face(wrapper: WrapperClass, params: JsonObject, settings: PixtralSettings, model: config.Model) -> JsonObject:
    """Return config.json, without what describes the text model, for a base in Mistral's own layout.

    Raises:
        ValueError: transformers has no such model.
    """
    if model.family not in wrapper.families():
        raise ValueError(f"{wrapper.architecture} has no text model of family {model.family}")
    stated = params["vision_encoder"]
    image_token = stated.get("image_token_id", _IMAGE_TOKEN)
    fields: JsonObject = {
        "architectures": [wrapper.architecture],
        "model_type": wrapper.model_type,
        "image_token_index": _IMAGE_TOKEN if image_token == _PLACEHOLDER else image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": settings.bias,
        "vision_feature_layer": -1,
        "vision_config": {
            "model_type": "pixtral",
            "attention_dropout": 0.0,
            "head_dim": settings.hidden_size // settings.num_attention_heads,
            "hidden_act": "silu",
            "hidden_size": settings.hidden_size,
            "image_size": settings.image_size,
            "initializer_range": 0.02,
            "intermediate_size": settings.intermediate_size,
            "num_attention_heads": settings.num_attention_heads,
            "num_channels": settings.num_channels,
            "num_hidden_layers": settings.num_hidden_layers,
            "patch_size": settings.patch_size,
            "rope_theta": settings.rope_theta,
        },
    }
    if settings.merge:
        fields["spatial_merge_size"] = settings.merge
    else:
        fields["vision_feature_select_strategy"] = "full"
    return fields


def processor_files(params: JsonObject, settings: PixtralSettings) -> Mapping[str, JsonObject]:
    """Return the processor's files for a base in Mistral's own layout, which keeps these settings in params.json."""
    patch = settings.patch_size
    image_processor: JsonObject = {
        "image_processor_type": "PixtralImageProcessor",
        "processor_class": "PixtralProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(_IMAGE_MEAN),
        "image_std": list(_IMAGE_STD),
        "patch_size": {"height": patch, "width": patch},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": params["vision_encoder"].get("max_image_size") or settings.image_size},
    }
    processor: JsonObject = {
        "processor_class": "PixtralProcessor",
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "patch_size": patch,
        "spatial_merge_size": settings.merge or 1,
    }
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}
