"""Mistral's own layout: `params.json` and `consolidated.safetensors`, for mistral-inference and vLLM's `--load-format mistral`.

mistral-inference loads strictly: a missing or unknown tensor is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.weights import fp8, names, on_disk, safetensors_files, together
from moe_train.weights.mistral.params_json import PARAMS_FILE, read_model_config, write_model_config
from moe_train.weights.on_disk import WeightFiles

log = logging.getLogger(__name__)

STEM = "consolidated"
"""First part of the names of Mistral's weight files."""
_VISION_PREFIXES = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
"""Prefixes of tensors of a vision model that hold no weight of its text model."""


def open_weights(directory: str | Path) -> WeightFiles:
    """Open a model's folder, one consolidated file or shards with their index; of a vision model, only the text model.

    Raises:
        ValueError: the model is tied but has an output weight of its own.
    """
    model = read_model_config(directory)
    stored = safetensors_files.open_model_tensors(directory, STEM)
    all_tensors = fp8.dequantize_tensors(stored, fp8.section_of_folder(Path(directory) / PARAMS_FILE))
    tensors = {name: tensor for name, tensor in all_tensors.items() if not name.startswith(_VISION_PREFIXES)}
    layout = names.mistral_of(model)
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
    left_out = tuple(all_tensors.keys() - tensors.keys())
    return WeightFiles(Path(directory), model, names.weight_pieces(model, layout), tensors, left_out)


def write(
    directory: Path,
    model: config.Model,
    dtype: on_disk.FileDtype,
    matrix: Callable[[names.WeightPiece], np.ndarray],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write consolidated.safetensors and params.json.

    If several processes hold the weights, all of them call this, and the first one writes.

    Args:
        directory: the folder.
        model: the architecture.
        dtype: dtype of the file.
        matrix: returns the values of a piece in `fp8.dtype_before_writing`; called for one piece at a time.
        tokenizer: the tokenizer that is exported with the weights.

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
        params["quantization"] = fp8.write.MISTRAL_SECTION
    pieces = names.weight_pieces(model, names.mistral_of(model))
    specs, values = fp8.tensors_of_dtype(pieces, dtype, matrix, fp8.write.MISTRAL_SCHEME)
    file = directory / f"{STEM}.safetensors"
    arrays = (values(spec) for spec in specs)
    together.first_writes(arrays, lambda arrays: safetensors_files.write_safetensors(file, specs, lambda spec: next(arrays)))
    if together.is_first():
        (directory / PARAMS_FILE).write_text(json.dumps(params, indent=4) + "\n", encoding="utf-8")


def tokenizer_file_name(file: Path) -> str:
    """Return the name that mistral-inference, vLLM and transformers look for: tekken.json, tokenizer.model.v3."""
    _, sentencepiece, version = file.name.partition(".model")
    if sentencepiece:
        return f"tokenizer{sentencepiece}{version}"
    return "tekken.json" if "tekken" in file.name else file.name
