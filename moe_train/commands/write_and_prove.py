"""Write a model's weights as a directory that other tools load: streamed, read back and compared, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from moe_train import config
from moe_train.data.records.conversation import Conversation
from moe_train.machine import progress
from moe_train.machine.files import check_space
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, prove
from moe_train.weights import gguf, hf, mistral, names, together
from moe_train.weights import merge as merging
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.safetensors_files import MAX_SHARD_BYTES, WriterShare
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts

Format = expected.Model


Matrix = Callable[[names.WeightPiece, np.dtype], np.ndarray]
"""Returns the values that a piece of the file's tensors has to hold, rounded once to a dtype."""


def export(
    parameters: LazyParameters,
    model: config.Model,
    out_dir: str | Path,
    layout: Format = "hf",
    *,
    dtype: str,
    lora: config.Lora | None = None,
    merge: bool = False,
    texts: Texts = NO_TEXTS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    depth: prove.Depth = "full",
    conversations: Sequence[Conversation] = (),
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a whole model's directory and prove it.

    Weights are streamed with one tensor in memory. `out_dir` appears complete or not at all. If the weights are spread over several
    processes, all of them call this and must see the same file system.

    Args:
        parameters: weights by path, in memory or in files.
        model: the architecture.
        out_dir: the folder to write; it must be empty or not exist yet.
        layout: layout of the files.
        dtype: float32 or bfloat16; for gguf also float16, q8_0 and llama.cpp's own types.
        lora: the section of the adapters in `parameters`.
        merge: whether to merge the adapters into the weights; without it there must be none.
        texts: tokenizer, chat template and config to put beside the weights.
        max_shard_bytes: size limit of a file of weights.
        depth: see `proof.prove`.
        conversations: training conversations whose tokens the proof compares.
        about: what else the record states.

    Returns:
        The record of `proof.prove`, which is also kept in the directory.

    Raises:
        FileExistsError: `out_dir` exists and is not an empty folder.
        ValueError: the layout cannot express the model.
        OSError: the disk is full.
        RuntimeError: the proof fails.
    """
    adapters = [path for path in parameters if ParameterPath.parse(path).is_adapter]
    if adapters and not merge:
        raise ValueError(
            f"the model has adapters ({len(adapters)} arrays): merge them (--merge), or export them alone (--format peft)"
        )
    if merge and not adapters:
        raise ValueError("there is nothing to merge: the model has no adapters")
    check_dtype(layout, dtype)
    section = lora if merge else None

    numbers = sum(array.size for path, array in parameters.items() if not ParameterPath.parse(path).is_adapter)
    check_space(out_dir, numbers * {"float32": 4, "f32": 4, "q8_0": 1}.get(dtype, 2))
    written = progress.counted("writing", numbers)

    def matrix(piece: names.WeightPiece, filetype: np.dtype) -> np.ndarray:
        array = piece.to_file(merging.merged(parameters, section, piece, filetype))
        written(array.size)
        return array

    with together.one_directory(out_dir) as directory:
        with together.all_or_none():
            write(directory, layout, model, dtype, matrix, texts, max_shard_bytes)
            if together.is_first():
                write_texts(directory, texts)
        exported = prove.Export(
            *(directory, layout, dtype, parameters, model, section),
            *(texts.tokenizer, texts.chat_template, conversations, about or {}),
        )
        record = prove.prove(exported, depth)
        if together.is_first():
            prove.write(directory, record)
        return record


def write(
    directory: Path, layout: Format, model: config.Model, dtype: str, matrix: Matrix, texts: Texts, max_shard_bytes: int
) -> None:
    """Write the files of a whole model, except those that `write_texts` copies."""
    match layout:
        case "hf":
            filetype = np.dtype(dtype)
            share = WriterShare(jax.process_index(), jax.process_count())
            hf.write(directory, model, dtype, lambda p: matrix(p, filetype), texts.tokenizer, max_shard_bytes, share)  # type: ignore[arg-type]
        case "mistral":
            filetype = np.dtype(dtype)
            mistral.write(directory, model, dtype, lambda p: matrix(p, filetype), texts.tokenizer)  # type: ignore[arg-type]
        case "gguf":
            gguf.write(directory, model, dtype, matrix, texts.tokenizer, texts.chat_template)


def check_dtype(layout: Format, dtype: str) -> None:
    """Raise ValueError if the layout does not support the dtype."""
    if layout != "gguf" and dtype not in get_args(config.Dtype):
        raise ValueError(f"dtype {dtype} is not one of {layout}'s, which are {', '.join(get_args(config.Dtype))}")
