"""A model's weights as a directory that other tools load: streamed, read back, compared; whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.data.tokenizer import Tokenizer
from moe_train.model.lora import is_lora
from moe_train.weights import hf, names, proof
from moe_train.weights import merge as merging
from moe_train.weights.arrays import Parameters
from moe_train.weights.on_disk import nbytes
from moe_train.weights.safetensors_io import MAX_SHARD_BYTES

Format = Literal["hf"]


class Texts(NamedTuple):
    """What an export holds besides weights."""

    tokenizer: Tokenizer | None = None
    """Its files are copied byte for byte."""
    chat_template: str | None = None
    """Replaces the tokenizer's own."""
    config: str | None = None
    """The resolved config of the run, kept as `moe_train.yaml`."""


NO_TEXTS = Texts()
Matrix = Callable[[names.Piece], np.ndarray]
"""What a piece of the file's tensors is to hold, in the dtype of the file."""


def export(
    parameters: Parameters,
    model: config.Model,
    out_dir: str | Path,
    layout: Format = "hf",
    *,
    dtype: config.Dtype,
    lora: config.Lora | None = None,
    merge: bool = False,
    texts: Texts = NO_TEXTS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model's directory; read it back and compare.

    merge: add the adapters in `parameters` (of the section `lora`) to the weights; without it there must be none.
    Streamed: one tensor in memory. `out_dir` appears whole, or not at all. Returns the figures of `proof.check`.
    Raises FileExistsError where out_dir is taken, ValueError for what cannot be said in this layout, OSError for a
    full disk.
    """
    adapters = [path for path in parameters if is_lora(path)]
    if adapters and not merge:
        raise ValueError(
            f"the model has adapters ({len(adapters)} arrays): merge them (--merge), or export them alone (--format peft)"
        )
    if merge and not adapters:
        raise ValueError("there is nothing to merge: the model has no adapters")
    filetype = np.dtype(dtype)

    def matrix(piece: names.Piece) -> np.ndarray:
        return piece.to_file(merging.merged(parameters, lora, piece, filetype))

    check_space(out_dir, sum(nbytes(array.shape, filetype) for path, array in parameters.items() if not is_lora(path)))
    with new_directory(out_dir) as directory:
        hf.write(directory, model, dtype, matrix, texts.tokenizer, max_shard_bytes)
        write_texts(directory, texts)
        return proof.check(directory, parameters, model, lora if merge else None, filetype)


def check_space(out_dir: str | Path, needed: int) -> None:
    """Raise OSError before anything is written where the disk has not the room."""
    there = next(path for path in Path(out_dir).absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{out_dir} needs {needed / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free")


def write_texts(directory: Path, texts: Texts) -> None:
    for file in texts.tokenizer.files if texts.tokenizer else ():
        shutil.copyfile(file, directory / file.name)
    if texts.chat_template is not None:
        (directory / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    if texts.config is not None:
        (directory / "moe_train.yaml").write_text(texts.config, encoding="utf-8")
