"""The sections `quantization_config` of config.json and `quantization` of params.json, as far as they describe FP8 weights.

Three spellings are understood: Hugging Face's `quant_method: fp8`, `compressed-tensors` of the format `float-quantized`, and
Mistral's own `qformat_weight: fp8_e4m3`. Any other key or value could change what the numbers stand for, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.on_disk import FloatDtype

Granularity = Literal["tensor", "channel", "block"]
"""How many numbers share a scale: a whole matrix, the inputs of one output, or a rectangle."""
DEFAULT_BLOCK = (128, 128)
"""Outputs and inputs of a block where a file does not state them."""

# Keys of each spelling that do not change what the weights are: activations are quantized at run time by servers alone.
_HF_BOOKKEEPING = {
    *("activation_scheme", "modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize", "kv_cache_scheme"),
}
_COMPRESSED_BOOKKEEPING = {"ignore", "quantization_status", "global_compression_ratio", "kv_cache_scheme", "version"}
_GROUP_BOOKKEEPING = {"targets", "input_activations", "output_activations", "format"}
_WEIGHTS_BOOKKEEPING = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_REMEDY = (
    "supported is FP8 (quant_method fp8, compressed-tensors float-quantized, or Mistral's qformat_weight fp8_e4m3); otherwise "
    "fetch the BF16 release, or load it in transformers with dequantize=True in its quantization config and save it in bfloat16"
)


class Fp8Section(NamedTuple):
    """What a config states about FP8 weights."""

    file: str
    """The file and key that state it, for messages."""
    granularity: Granularity | None = None
    """None if the section does not state it, so that the shapes of the scales decide."""
    block: tuple[int, int] = DEFAULT_BLOCK
    """Outputs and inputs of a block."""
    dtype: FloatDtype = "bfloat16"
    """Dtype to which dequantized values are rounded: the one of the model's other weights, as in transformers."""


def section_of_folder(file: Path) -> Fp8Section | None:
    """Read the section from a model's config.json or params.json; None if it states no quantization, or is missing.

    Raises:
        ValueError: the file states a quantization that is not supported.
    """
    if not file.is_file():
        return None
    fields = read_object(file)
    try:
        return find_section(fields, str(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def find_section(fields: JsonObject, file: str = "") -> Fp8Section | None:
    """Return the section among the fields of a config.json or params.json, of a vision wrapper or of its text model.

    Args:
        fields: content of the file.
        file: the file, for later messages.

    Raises:
        ValueError: the section states something that is not supported.
    """
    text = fields.get("text_config")
    sections: list[tuple[str, object]] = []
    for key in ("quantization_config", "quantization"):
        sections += [(key, level[key]) for level in (fields, text) if isinstance(level, dict) and level.get(key)]
    if not sections:
        return None
    key, section = sections[0]
    parsed = _parse(key, section)
    for other_key, other in sections[1:]:
        if _parse(other_key, other)[1:] != parsed[1:]:
            raise ValueError(f"{key} and a second {other_key} state different quantizations; keep the one of the weights")
    return parsed._replace(file=f"{file}: {key}", dtype=_dtype(fields, text))


def _dtype(fields: JsonObject, text: object) -> FloatDtype:
    """Return the dtype that the config states for weights; bfloat16 without one."""
    for level in (text, fields):
        for key in ("dtype", "torch_dtype"):
            stated = level.get(key) if isinstance(level, dict) else None
            if stated == "float32" or stated == "float16":
                return stated
            if stated is not None:
                return "bfloat16"
    return "bfloat16"


def _parse(key: str, section: object) -> Fp8Section:
    """Parse a section of any spelling."""
    if not isinstance(section, dict):
        raise ValueError(f"{key} is {section!r}; it has to be an object")
    method = str(section.get("quant_method", "")).lower().replace("_", "-")
    if "qformat_weight" in section:
        return _parse_mistral(key, section)
    if method == "fp8":
        return _parse_hugging_face(key, section)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(key, section)
    raise ValueError(f"{key}.quant_method is {section.get('quant_method')!r}, which is not supported; {_REMEDY}")


def _parse_mistral(key: str, section: JsonObject) -> Fp8Section:
    """Parse Mistral's own spelling (vllm/transformers_utils/configs/mistral.py)."""
    _require(key, section, {"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", "NO_SCALES", None)})
    return Fp8Section(key)


def _parse_hugging_face(key: str, section: JsonObject) -> Fp8Section:
    """Parse the spelling of transformers' FineGrainedFP8Config, which vLLM reads too."""
    allowed = {
        "quant_method": (section["quant_method"],),
        "weight_block_size": (section.get("weight_block_size"),),
        "fmt": ("e4m3", None),
        "scale_fmt": ("float", None),
        "expert_dtype": ("fp8", None),
    }
    _require(key, section, allowed, _HF_BOOKKEEPING)
    if "weight_block_size" not in section:
        return Fp8Section(key)
    block = section["weight_block_size"]
    if block is None:
        return Fp8Section(key, "tensor")
    return Fp8Section(key, "block", _block(f"{key}.weight_block_size", block))


def _parse_compressed_tensors(key: str, section: JsonObject) -> Fp8Section:
    """Parse the spelling of the library compressed-tensors; several groups must agree about their weights."""
    allowed = {
        "quant_method": (section["quant_method"],),
        "config_groups": (section.get("config_groups"),),
        "format": ("float-quantized", "naive-quantized"),
        "sparsity_config": ({}, None),
        "transform_config": ({}, None),
    }
    _require(key, section, allowed, _COMPRESSED_BOOKKEEPING)
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{key}.config_groups is {groups!r}; it has to describe the quantized weights")
    parsed = {name: _parse_group(f"{key}.config_groups.{name}", group) for name, group in groups.items()}
    first, *others = parsed.values()
    if any(group[1:] != first[1:] for group in others):
        raise ValueError(f"{key}.config_groups {', '.join(parsed)} quantize weights differently; one scheme for all is supported")
    return first._replace(file=key)


def _parse_group(key: str, group: object) -> Fp8Section:
    """Parse one of `config_groups`."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise ValueError(f"{key}.weights is {weights!r}; it has to describe the quantized weights")
    _require(key, group, {"weights": (weights,)}, _GROUP_BOOKKEEPING)
    allowed = {
        "num_bits": (8,),
        "type": ("float",),
        "strategy": ("tensor", "channel", "block"),
        "block_structure": (weights.get("block_structure"),),
        "symmetric": (True, None),
        "dynamic": (False, None),
        "group_size": (None,),
        "actorder": (None,),
    }
    _require(f"{key}.weights", weights, allowed, _WEIGHTS_BOOKKEEPING)
    strategy = weights["strategy"]
    if strategy != "block":
        return Fp8Section(key, strategy)
    return Fp8Section(key, "block", _block(f"{key}.weights.block_structure", weights.get("block_structure")))


def _block(key: str, block: object) -> tuple[int, int]:
    """Return the outputs and inputs of a block."""
    if isinstance(block, list) and len(block) == 2:
        outputs, inputs = block
        if type(outputs) is int and type(inputs) is int and outputs > 0 and inputs > 0:
            return outputs, inputs
    raise ValueError(f"{key} is {block!r}; it has to be two positive integers, the outputs and inputs of a block")


def _require(key: str, section: JsonObject, allowed: Mapping[str, tuple[object, ...]], bookkeeping: set[str] | None = None) -> None:
    """Raise ValueError if a key has a value that is not allowed, or is not understood and switches something on."""
    for name, values in allowed.items():
        if section.get(name) not in values:
            supported = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{key}.{name} is {section.get(name)!r}; supported: {supported}; {_REMEDY}")
    for name, value in section.items():
        if name not in allowed and name not in (bookkeeping or ()) and value not in (None, False, [], {}, ""):
            raise ValueError(f"{key}.{name} is {value!r}, which is not understood and may change what the weights are; {_REMEDY}")
