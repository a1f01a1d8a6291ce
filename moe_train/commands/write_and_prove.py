"""Write a model's weights as a directory that other tools load: streamed, read back and compared, complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from moe_train import config
from moe_train.data.records.normal_form import Conversation
from moe_train.machine import progress
from moe_train.machine.files import JsonObject, check_space
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, prove
from moe_train.proof.carried import CarriedFrom
from moe_train.weights import fp8, gguf, hf, mistral, names, together
from moe_train.weights import merge as merging
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.on_disk import FileDtype, FloatDtype, WeightFiles
from moe_train.weights.safetensors_files import MAX_SHARD_BYTES, WriterShare
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts
from moe_train.weights.wrappers.carry import Wrapping

PieceValues = Callable[[names.WeightPiece, np.dtype], np.ndarray]
"""Returns the values of a piece of the file's tensors, rounded once to a dtype."""

BYTES_PER_VALUE = {"float32": 4, "f32": 4, "q8_0": 1, "fp8": 1}
"""Bytes of a value by dtype, to check for disk space; 2 for all others, which is an upper bound for quantized types."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a whole model is written and verified."""

    dtype: str
    """float32, bfloat16, float16 or fp8 (not for gguf); for gguf also q8_0 and llama.cpp's own types."""
    layout: expected.ModelLayout = "hf"
    """Layout of the files."""
    lora: config.Lora | None = None
    """The section of the adapters among the weights; None if there are none."""
    merge: bool = False
    """Whether to merge the adapters into the weights; without it there must be none."""
    texts: Texts = NO_TEXTS
    """Tokenizer, chat template and config to write in addition to the weights."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Size limit of a file of weights."""
    depth: prove.Depth = "full"
    """`tensors` skips the checks that run the model."""
    conversations: Sequence[Conversation] = ()
    """Training conversations whose tokens are compared."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Additional entries of the record, such as where the weights come from."""
    wrapping: Wrapping | None = None
    """The tower and projector of a multimodal base that are carried into the files; None for a text model."""
    mmproj: Path | None = None
    """llama.cpp's file of the base's tower, which is copied into a GGUF export; None for none."""
    base: WeightFiles | None = None
    """The files that training started from, if they are FP8 (`left_out.fp8_base`)."""
    encoder: config.Encoder | None = None
    """Sizes of a tower of which the parameters have trained weights; None if nothing of it was trained."""


def export_model(parameters: LazyParameters, model: config.Model, out_dir: str | Path, options: WriteOptions) -> JsonObject:
    """Write a whole model's directory, and verify it by reading it back.

    Weights are streamed with one tensor in memory. `out_dir` appears complete or not at all. If the weights are spread over several
    processes, all of them call this and must see the same file system.

    Args:
        parameters: weights by path, in memory or in files.
        model: the architecture.
        out_dir: the directory to create; it must be empty or not exist yet.
        options: how the model is written.

    Returns:
        The record of `proof.prove`, which is also kept in the directory.

    Raises:
        FileExistsError: `out_dir` exists and is not an empty directory.
        ValueError: the layout cannot express the model.
        OSError: the disk is full.
        RuntimeError: the verification fails.
    """
    _check_adapters(parameters, options.merge)
    check_dtype(options.layout, options.dtype)
    lora = options.lora if options.merge else None
    # Adapters take no space of their own in a whole model: they are merged.
    paths = {path: ParameterPath.parse(path) for path in parameters}
    # Nor what was trained of a tower, which counts with what is carried.
    num_values = sum(x.size for name, x in parameters.items() if not (paths[name].is_adapter or paths[name].is_tower))
    if options.dtype == "fp8" and options.wrapping is not None and options.wrapping.is_quantized:
        raise ValueError(
            f"the {options.wrapping.parts} of {options.wrapping.source} is FP8 with scales of its own, and files state one "
            "quantization for all; use --dtype bfloat16, or --text-only for the text model alone"
        )
    carried_bytes = 0 if options.wrapping is None else options.wrapping.nbytes
    check_space(out_dir, num_values * BYTES_PER_VALUE.get(options.dtype, 2) + carried_bytes)
    report_written = progress.counted("writing", num_values)

    def piece_values(piece: names.WeightPiece, dtype: np.dtype) -> np.ndarray:
        values = piece.to_file(merging.merged(parameters, lora, piece, dtype))
        report_written(values.size)
        return values

    texts = options.texts
    with together.one_directory(out_dir) as directory:
        with together.all_or_none():
            write_model(directory, model, piece_values, options)
            if together.is_first():
                write_texts(directory, texts)
                _write_carried_files(directory, options)
        exported = prove.Export(
            directory,
            options.layout,
            options.dtype,
            parameters,
            model,
            lora,
            texts.tokenizer,
            texts.chat_template,
            options.conversations,
            options.about,
            None if options.wrapping is None else CarriedFrom(options.wrapping.source, options.wrapping.layout_of_base),
            options.base,
            options.encoder,
        )
        # Within the block, so that an export that fails its checks never appears as `out_dir`.
        record = prove.prove(exported, options.depth)
        if together.is_first():
            prove.write_record(directory, record)
        return record


def _write_carried_files(directory: Path, options: WriteOptions) -> None:
    """Write the files of a multimodal base that hold no tensors of ours: its processor, and llama.cpp's file of the tower."""
    if options.wrapping is not None:
        options.wrapping.write_files(directory)
    if options.mmproj is not None:
        shutil.copyfile(options.mmproj, directory / options.mmproj.name)


def _check_adapters(parameters: LazyParameters, merge: bool) -> None:
    """Raise ValueError if there are adapters that are not merged, or none to merge."""
    adapters = [path for path in parameters if ParameterPath.parse(path).is_adapter]
    if adapters and not merge:
        raise ValueError(
            f"the model has adapters ({len(adapters)} arrays); merge them (--merge), or export them alone (--format peft)"
        )
    if merge and not adapters:
        raise ValueError("the model has no adapters to merge; leave --merge out")


def write_model(directory: Path, model: config.Model, piece_values: PieceValues, options: WriteOptions) -> None:
    """Write the files of a whole model, except those that `write_texts` copies."""
    tokenizer = options.texts.tokenizer
    # gguf.write chooses a dtype for each tensor; the other layouts have one for all.
    if options.layout == "gguf":
        gguf.write(directory, model, options.dtype, piece_values, tokenizer, options.texts.chat_template)
        return
    dtype = checked_dtype(options.layout, options.dtype)

    def matrix(piece: names.WeightPiece) -> np.ndarray:
        return piece_values(piece, fp8.dtype_before_writing(piece, dtype))

    match options.layout:
        case "hf":
            # Each process writes the shards of its share of the tensors.
            share = WriterShare(jax.process_index(), jax.process_count())
            hf.write(directory, model, dtype, matrix, tokenizer, options.max_shard_bytes, share, options.wrapping)
        case "mistral":
            mistral.write(directory, model, dtype, matrix, tokenizer, options.wrapping)


def check_dtype(layout: expected.ModelLayout, dtype: str) -> None:
    """Raise ValueError if the layout does not support the dtype; gguf's other dtypes are checked when it is written."""
    if layout != "gguf":
        checked_dtype(layout, dtype)
    elif dtype == "fp8":
        raise ValueError("--format gguf has no FP8 numbers; use --dtype q8_0 (8 bits) or bf16, or --format hf or mistral")


def checked_dtype(layout: str, dtype: str) -> FileDtype:
    """Return the dtype of a whole model's safetensors files. Raises ValueError if it is not supported."""
    for supported in get_args(FileDtype):
        if dtype == supported:
            return supported
    raise ValueError(f"--format {layout} does not support dtype {dtype}; use {', '.join(get_args(FileDtype))}")


def checked_float_dtype(layout: str, dtype: str) -> FloatDtype:
    """Return the dtype of an adapter's safetensors files. Raises ValueError if it is not supported."""
    for supported in get_args(FloatDtype):
        if dtype == supported:
            return supported
    raise ValueError(f"--format {layout} does not support dtype {dtype}; use {', '.join(get_args(FloatDtype))}")
