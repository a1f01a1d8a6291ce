"""Mistral's own layout: `params.json` and `consolidated.safetensors`, for mistral-inference and vLLM's `--load-format mistral`.

mistral-inference loads strictly: a missing or unknown tensor is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object
from moe_train.weights import fp8, names, on_disk, safetensors_files, together
from moe_train.weights.mistral.params_json import PARAMS_FILE, read_model_config, write_model_config
from moe_train.weights.on_disk import Carried, WeightFiles
from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.carry import Wrapping
from moe_train.weights.wrappers.whisper import NATIVE_PREFIX, WhisperSettings

log = logging.getLogger(__name__)

STEM = "consolidated"
"""First part of the names of Mistral's weight files."""


def open_weights(directory: str | Path) -> WeightFiles:
    """Open a model's folder, one consolidated file or shards with their index.

    Raises:
        ValueError: the model is tied but has an output weight of its own, or the tower of a multimodal model is not the one that
            params.json describes.
    """
    model = read_model_config(directory)
    text: dict[str, safetensors_files.SafetensorsTensor] = {}
    outside_text: dict[str, safetensors_files.SafetensorsTensor] = {}
    for name, tensor in safetensors_files.open_model_tensors(directory, STEM, _is_outside_text).items():
        (outside_text if _is_outside_text(name) else text)[name] = tensor
    carried = _carried(directory, model, outside_text)
    tensors = fp8.dequantize_tensors(text, fp8.section_of_folder(Path(directory) / PARAMS_FILE))
    layout = names.mistral_of(model, with_audio=names.MISTRAL_AUDIO_EMBED in tensors)
    head = layout.head.name
    embed = layout.embed.name
    # A tied head may be written as well; it is accepted only as an exact copy.
    if model.tie_embeddings and head in tensors:
        if embed not in tensors or not on_disk.have_same_content(tensors[head], tensors[embed]):
            raise ValueError(
                f"{directory} has an {head} that differs from the embedding, but tied_embeddings is true in its {PARAMS_FILE}; "
                "set it to false, or remove the tensor"
            )
        del tensors[head]
    names.check_counts(directory, model, tensors)
    return WeightFiles(Path(directory), model, names.weight_pieces(model, layout), tensors, carried)


def _is_outside_text(name: str) -> bool:
    return name.startswith(towers.NATIVE_PREFIXES)


def _carried(directory: str | Path, model: config.Model, tensors: dict[str, safetensors_files.SafetensorsTensor]) -> Carried | None:
    """Return the parts of a multimodal model around its text model; None for a text model.

    Raises:
        ValueError: they are not those that params.json describes.
    """
    file = Path(directory) / PARAMS_FILE
    fields = read_object(file)
    try:
        settings = towers.native_settings(fields, model.model_dim)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if settings is None:
        if not tensors:
            return None
        name = next(iter(tensors))
        section = "multimodal" if name.startswith(NATIVE_PREFIX) else "vision_encoder"
        raise ValueError(f"{directory} has {name}, but {file} describes no {section}; restore the file")
    expected = {tensor.native: tensor.shape for tensor in towers.tower_tensors(settings) if tensor.native is not None}
    towers.check_complete(directory, expected, {name: tensor.shape for name, tensor in tensors.items()})
    parts = "audio tower and projector" if isinstance(settings, WhisperSettings) else "vision tower and projector"
    return Carried(parts, "mistral", None, fields, settings, tensors)


def write(
    directory: Path,
    model: config.Model,
    dtype: on_disk.FileDtype,
    matrix: Callable[[names.WeightPiece], np.ndarray],
    tokenizer: Tokenizer | None = None,
    wrapping: Wrapping | None = None,
) -> None:
    """Write consolidated.safetensors and params.json.

    If several processes hold the weights, all of them call this, and the first one writes.

    Args:
        directory: the folder.
        model: the architecture.
        dtype: dtype of the file.
        matrix: returns the values of a piece in `fp8.dtype_before_writing`; called for one piece at a time.
        tokenizer: the tokenizer that is exported with the weights.
        wrapping: the other parts of a multimodal model; None for a text model.

    Raises:
        ValueError: params.json cannot express the model.
    """
    params = write_model_config(model)
    if isinstance(tokenizer, HuggingFace):
        log.warning(
            "mistral-inference reads only tekken.json or a sentencepiece model; the tokenizer.json that is written next to the "
            "weights is for moe-train and for vLLM with --tokenizer-mode auto"
        )
    if dtype == "fp8":
        params["quantization"] = fp8.scheme.MISTRAL_SECTION
    layout = names.mistral_of(model) if wrapping is None else wrapping.text_layout
    specs, values = fp8.tensors_of_dtype(names.weight_pieces(model, layout), dtype, matrix, fp8.scheme.MISTRAL_SCHEME)
    carried = {} if wrapping is None else wrapping.tensors
    carried_specs = [safetensors_files.TensorSpec(name, tensor.base.shape, tensor.base.dtype) for name, tensor in carried.items()]
    file = directory / f"{STEM}.safetensors"

    def write_all(arrays: Iterator[safetensors_files.TensorValues]) -> None:
        """Write the file: the arrays in the order of `specs`, and what is carried, which the first process reads alone."""
        safetensors_files.write_safetensors(
            file, [*specs, *carried_specs], lambda spec: carried[spec.name].read() if spec.name in carried else next(arrays)
        )

    together.first_writes((values(spec) for spec in specs), write_all)
    if wrapping is not None:
        params = wrapping.around(params)
    if together.is_first():
        (directory / PARAMS_FILE).write_text(json.dumps(params, indent=4) + "\n", encoding="utf-8")


def tokenizer_file_name(file: Path) -> str:
    """Return the name that mistral-inference, vLLM and transformers look for: tekken.json, tokenizer.model.v3."""
    _, sentencepiece, version = file.name.partition(".model")
    if sentencepiece:
        return f"tokenizer{sentencepiece}{version}"
    return "tekken.json" if "tekken" in file.name else file.name
