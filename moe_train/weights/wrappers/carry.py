"""Carry the tower and the projector of a multimodal base into an export: tensors, settings and processor files.

In Hugging Face's layout a base of that layout keeps the bytes of every tensor. FP8 tensors are dequantized for any other export:
readers of Mistral's own layout load towers unquantized, without a look at scales (PixtralForConditionalGeneration of vLLM 0.33).
Between Hugging Face's and Mistral's own layout, names change and the rows of
q and k of vision towers change places within each head, as in text models; both directions are exact. Readers of Mistral's own
layout compute what Hugging Face's config.json states (silu, gelu, the last layer, sinusoidal positions of audio), so other settings
are refused there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights import fp8, names
from moe_train.weights.on_disk import Carried, FileTensor, array_bytes
from moe_train.weights.wrappers import pixtral_settings, towers, whisper, whisper_settings
from moe_train.weights.wrappers.classes import WRAPPERS, WrapperClass
from moe_train.weights.wrappers.whisper import WhisperSettings

log = logging.getLogger(__name__)

WrappingLayout = Literal["hf", "mistral"]
"""Layouts that can express a multimodal model in one folder."""
_TEXT_ONLY = "or --text-only for the text model alone"
_OF_EXPORT = ("text_config", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "transformers_version")
"""Keys of config.json that the export states itself."""


class CarriedTensor(NamedTuple):
    """A tensor of the base under its name in the export."""

    name: str
    base_name: str
    """Name in the base; empty for a tensor that is computed, since the base's layout leaves it to the readers."""
    base: FileTensor
    heads: int = 0
    """Number of heads if the rows of each change places; 0 if the tensor keeps its bytes."""
    to_native: bool = False
    """Whether the rows go to the order of Mistral's own layout, or from there to Hugging Face's."""

    def read(self) -> np.ndarray:
        """Read the tensor in the order of the export."""
        w = self.base.read()
        if not self.heads:
            return w
        outputs, inputs = w.shape
        half = outputs // self.heads // 2
        # Rotary pairs are half a head apart in Hugging Face's layout, and adjacent in Mistral's own.
        halves = (2, half) if self.to_native else (half, 2)
        return w.reshape(self.heads, *halves, inputs).transpose(0, 2, 1, 3).reshape(outputs, inputs)


class Wrapping(NamedTuple):
    """What an export has besides the tensors and settings of its text model."""

    source: Path
    """The base."""
    parts: str
    """What is carried, for messages."""
    layout_of_base: WrappingLayout
    layout: WrappingLayout
    """Layout of the export."""
    text_layout: names.TensorLayout
    """Names of the text model's tensors in the export."""
    tensors: Mapping[str, CarriedTensor]
    """Tensors by their names in the export."""
    fields: JsonObject
    """Entries of config.json without those of the text model, or entries to add to params.json."""
    files: Mapping[str, Path | JsonObject]
    """Files of the processor by name: copied from the base, or content to write."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array_bytes(tensor.base.shape, tensor.base.dtype) for tensor in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether a tensor is FP8."""
        return any(_is_fp8(tensor.base) for tensor in self.tensors.values())

    def around(self, text: JsonObject) -> JsonObject:
        """Return the settings of the export, given config.json or params.json of its text model."""
        if self.layout == "mistral":
            return {**text, **self.fields}
        inner = {key: value for key, value in text.items() if key not in ("architectures", "quantization_config")}
        # transformers ties by what the wrapper states; dtype and quantization are those of the whole model.
        outer = {key: text[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype")}
        if section := text.get("quantization_config"):
            # Modules are named as in memory, where the prefixes of files change places.
            of_text = [
                name.replace("language_model.model.", "model.language_model.", 1) for name in section["modules_to_not_convert"]
            ]
            excluded = [*of_text, *sorted({_module_of(name) for name in self.tensors})]
            outer["quantization_config"] = {**section, "modules_to_not_convert": excluded}
        return {**self.fields, "text_config": inner, **outer}

    def write_files(self, directory: Path) -> None:
        """Write the files of the processor."""
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, directory / name)
            else:
                (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _module_of(name: str) -> str:
    """Return the tower or projector of a carried tensor, as transformers names it in memory."""
    return f"model.{name.partition('.')[0]}"


def carry(
    source: Path,
    carried: Carried,
    layout: WrappingLayout,
    model: config.Model,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
) -> Wrapping:
    """Return what an export in `layout` has of its multimodal base.

    Args:
        source: the base.
        carried: its parts around the text model.
        layout: layout of the export.
        model: the text model.
        tokenizer: the tokenizer of the export; None without one.
        chat_template: the chat template of the export; None for the tokenizer's own.

    Raises:
        ValueError: the layout cannot express the parts, or nothing public states how.
    """
    if not carried.layout == layout == "hf":
        carried = _dequantized(source, carried)
    if carried.layout == layout:
        tensors = {name: CarriedTensor(name, name, tensor) for name, tensor in carried.tensors.items()}
        fields = _own_fields(carried)
        files = processor_files(source, chat_template) if layout == "hf" else {}
        return Wrapping(source, carried.parts, carried.layout, layout, _text_layout(carried, layout, model), tensors, fields, files)
    if any(name.endswith(towers.QUANTIZATION_SUFFIXES) for name in carried.tensors):
        raise ValueError(
            f"the {carried.parts} of {source} is quantized, and can only be carried in the base's own layout; use --format "
            f"{carried.layout}, {_TEXT_ONLY}"
        )
    try:
        fields, files = _converted_settings(source, carried, layout, model, tokenizer)
        tensors = {tensor.name: tensor for tensor in _converted(carried, layout)}
    except ValueError as error:
        raise ValueError(f"{source}: {error}; use --format {carried.layout}, {_TEXT_ONLY}") from error
    return Wrapping(source, carried.parts, carried.layout, layout, _text_layout(carried, layout, model), tensors, fields, files)


def _converted_settings(
    source: Path, carried: Carried, layout: WrappingLayout, model: config.Model, tokenizer: Tokenizer | None
) -> tuple[JsonObject, dict[str, Path | JsonObject]]:
    """Return the settings of the carried parts and the files of the processor in the other layout than the base's.

    Raises:
        ValueError: readers of that layout would compute something else.
    """
    settings = carried.settings
    control_id = _control_id(tokenizer)
    if isinstance(settings, WhisperSettings):
        if layout == "mistral":
            return {"multimodal": whisper_settings.to_native(carried.fields, settings, source, control_id)}, {}
        fields = whisper_settings.to_hugging_face(carried.fields, settings, model, control_id)
        return fields, dict(whisper_settings.processor_files(carried.fields, settings))
    if layout == "mistral":
        return {"vision_encoder": pixtral_settings.to_native(carried.fields, settings, source, control_id)}, {}
    fields = pixtral_settings.to_hugging_face(_class_for(settings), carried.fields, settings, model)
    return fields, dict(pixtral_settings.processor_files(carried.fields, settings))


def _converted(carried: Carried, layout: WrappingLayout) -> Iterator[CarriedTensor]:
    """Yield the tensors of the carried parts in the other layout than the base's.

    The positions of an audio tower have no place in Mistral's own layout, whose readers compute them.

    Raises:
        ValueError: the base's positions are not those.
    """
    settings = carried.settings
    for row in towers.tower_tensors(settings):
        if row.native is None:
            assert isinstance(settings, WhisperSettings), row  # the table of vision towers has both names
            if layout == "mistral":
                whisper_settings.check_positions(carried.tensors[row.name], settings)
            else:
                yield CarriedTensor(row.name, "", whisper.Positions(settings))
            continue
        name, base_name = (row.native, row.name) if layout == "mistral" else (row.name, row.native)
        yield CarriedTensor(name, base_name, carried.tensors[base_name], row.heads, layout == "mistral")


def _text_layout(carried: Carried, layout: WrappingLayout, model: config.Model) -> names.TensorLayout:
    """Return the names of the text model inside the export."""
    if layout == "hf":
        return names.wrapped_in_files(model)
    return names.mistral_of(model, with_audio=isinstance(carried.settings, WhisperSettings))


def _own_fields(carried: Carried) -> JsonObject:
    """Return the settings of the base that describe the carried parts, for an export in the base's own layout."""
    if carried.layout == "mistral":
        return {key: carried.fields[key] for key in ("vision_encoder", "multimodal") if carried.fields.get(key)}
    fields = {key: value for key, value in carried.fields.items() if key not in _OF_EXPORT}
    assert carried.wrapper is not None
    fields = {"architectures": [carried.wrapper.architecture], "model_type": carried.wrapper.model_type, **fields}
    if any(map(_is_fp8, carried.tensors.values())) and carried.fields.get("quantization_config"):
        # The text model is written unquantized, so only the carried parts still are what the section describes.
        section = dict(carried.fields["quantization_config"])
        excluded = [*(section.get("modules_to_not_convert") or ()), "model.language_model", "language_model", "lm_head"]
        fields["quantization_config"] = {**section, "modules_to_not_convert": sorted(set(excluded))}
    return fields


def _is_fp8(tensor: FileTensor) -> bool:
    return tensor.dtype.name.startswith("float8")


def _dequantized(source: Path, carried: Carried) -> Carried:
    """Return the carried parts with FP8 tensors as tensors whose reading dequantizes them; says so in a line.

    Raises:
        ValueError: scales are missing or do not fit, or FP8 tensors are not matrices.
    """
    num_quantized = sum(_is_fp8(tensor) for tensor in carried.tensors.values())
    if not num_quantized:
        return carried
    section = fp8.section_of_folder(source / ("config.json" if carried.layout == "hf" else "params.json"))
    tensors = fp8.dequantize_tensors(carried.tensors, section)
    log.warning(
        "%d tensors of the %s of %s are FP8 and are written dequantized, since readers load them unquantized from such an export",
        num_quantized,
        carried.parts,
        source,
    )
    return carried._replace(tensors=tensors)


def _class_for(settings: towers.PixtralSettings) -> WrapperClass:
    """Return the class of transformers with this projector."""
    if bool(settings.merge) != settings.norm:
        norm = "a norm" if settings.norm else "no norm"
        merger = "a merger" if settings.merge else "no merger"
        raise ValueError(f"its projector has {norm} and {merger} of patches, which no class of transformers has")
    return WRAPPERS["Mistral3ForConditionalGeneration" if settings.merge else "LlavaForConditionalGeneration"]


def _control_id(tokenizer: Tokenizer | None) -> Callable[[str], int | None]:
    """Return a function from the name of a control token to its id; None for a name that the tokenizer does not have."""
    if tokenizer is None:
        return lambda name: None
    ids = {tokenizer.decode([number], keep_special=True): number for number in tokenizer.control_ids}
    return ids.get


def processor_files(source: Path, chat_template: str | None) -> dict[str, Path | JsonObject]:
    """Return the files of the base that describe how images or audio become inputs of its tower.

    Args:
        source: the base.
        chat_template: the chat template of the export. A `chat_template.json`, in which older versions of transformers keep the
            processor's, is carried only if it states the same.
    """
    files: dict[str, Path | JsonObject] = {file.name: file for file in sorted(source.glob("*processor_config.json"))}
    old_template = source / "chat_template.json"
    if old_template.is_file() and read_object(old_template).get("chat_template") == chat_template:
        files[old_template.name] = old_template
    return files
