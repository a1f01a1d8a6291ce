"""Open Hugging Face models, and write them in the layout that transformers 4 and 5, vLLM and llama.cpp load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject
from moe_train.weights import fp8, names, on_disk, safetensors_files
from moe_train.weights.hf.config_json import read_model_config, write_model_config
from moe_train.weights.hf.config_keys import CONFIG_FILE
from moe_train.weights.on_disk import WeightFiles


def open_weights(directory: str | Path) -> WeightFiles:
    """Open a model's directory, single file or shards. Raises ValueError if a tied model has a different head of its own."""
    model = read_model_config(directory)
    tensors, left_out = open_tensors(directory)
    if model.tie_embeddings:
        _drop_copied_head(directory, tensors)
    names.check_counts(directory, model, tensors)
    pieces = names.weight_pieces(model, names.detect_hugging_face(tensors))
    return WeightFiles(Path(directory), model, pieces, tensors, left_out)


def _drop_copied_head(directory: str | Path, tensors: dict[str, on_disk.FileTensor]) -> None:
    """Remove a copy of a tied head, which some tools write. Raises ValueError if it differs from the embedding."""
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in tensors if name.endswith("embed_tokens.weight")]
    for head in heads:
        if not embeddings or not on_disk.have_same_content(tensors[head], tensors[embeddings[0]]):
            raise ValueError(
                f"{directory} has a {head} that differs from the embedding, but tie_word_embeddings is true in its config.json; "
                "set it to false, or remove the tensor"
            )
        del tensors[head]


class OpenedTensors(NamedTuple):
    """The tensors of a model's folder."""

    of_text: dict[str, on_disk.FileTensor]
    """Tensors of the text model by name; FP8 ones are dequantized when they are read."""
    left_out: tuple[str, ...]
    """Names of the vision tower's and the projector's tensors, which are not read."""


def open_tensors(directory: str | Path) -> OpenedTensors:
    """Open the tensors of the text model."""
    of_text: dict[str, on_disk.FileTensor] = {}
    left_out: list[str] = []
    stored = safetensors_files.open_model_tensors(directory)
    for name, tensor in fp8.dequantize_tensors(stored, fp8.section_of_folder(Path(directory) / CONFIG_FILE)).items():
        if any(part in name for part in names.OUTSIDE_TEXT):
            left_out.append(name)
        elif not any(part in name for part in names.RECOMPUTED):
            of_text[name] = tensor
    return OpenedTensors(of_text, tuple(left_out))


def write(
    directory: Path,
    model: config.Model,
    dtype: on_disk.FileDtype,
    matrix: Callable[[names.WeightPiece], np.ndarray],
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
    share: safetensors_files.WriterShare = safetensors_files.SOLE_WRITER,
) -> None:
    """Write shards, their index, config.json and generation_config.json.

    Args:
        directory: the folder.
        model: the architecture.
        dtype: dtype of the files.
        matrix: returns the values of a piece in `fp8.dtype_before_writing`; called for one piece at a time.
        tokenizer: states the ids of control tokens; None if the export has none.
        max_shard_bytes: size limit of a shard.
        share: the part of one of several processes that write together.
    """
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    # Tensors that FP8 leaves out are bfloat16.
    settings = write_model_config(model, dtype="bfloat16" if dtype == "fp8" else dtype, bos_token_id=bos_id, eos_token_id=eos_id)
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    pieces = names.weight_pieces(model)
    if dtype == "fp8":
        settings["quantization_config"] = fp8.write.hugging_face_section(pieces)
    specs, values = fp8.tensors_of_dtype(pieces, dtype, matrix, fp8.write.hugging_face_scheme(pieces))
    safetensors_files.write_shards(directory, specs, values, max_shard_bytes, share)
    # The first process writes the small files for all.
    if share.first != 0:
        return
    write_json(directory / CONFIG_FILE, settings)
    # A chat may end its turns with another token than EOS; config.json keeps the single one.
    if tokenizer is not None and len(tokenizer.end_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.end_ids)
    # Without this file, servers generate past the end of an answer.
    write_json(directory / "generation_config.json", {"_from_model_config": True, **generation})


def write_json(file: Path, value: JsonObject) -> None:
    """Write a JSON file with indentation."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
