"""Hugging Face models: from a directory into sharded arrays, and from arrays into a new directory."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.data.tokenizer import Tokenizer
from moe_train.model.lora import is_lora
from moe_train.weights import merge as merging
from moe_train.weights import names, proof, safetensors_io
from moe_train.weights.arrays import Abstract, Parameters, fill
from moe_train.weights.hf_config import read_model_config, write_model_config


class Texts(NamedTuple):
    """What an export holds besides weights."""

    tokenizer: Tokenizer | None = None
    """Its files are copied byte for byte."""
    chat_template: str | None = None
    """Replaces the tokenizer's own."""
    config: str | None = None
    """The resolved config of the run, kept as `moe_train.yaml`."""


NO_TEXTS = Texts()


def load_parameters(directory: str | Path, abstract: Abstract) -> Parameters:
    """The weights of a model's directory as arrays of the shapes, dtypes and shardings of `abstract` ({path: …}).

    `abstract` may name some of the weights; adapters are in no such directory. The host holds one device's part of
    one array at a time. Raises ValueError unless the tensors are those of config.json and fill every array.
    """
    model, tensors = read_model_config(directory), open_tensors(directory)
    table = names.pieces_of(model, tensors)
    if model.tie_embeddings:
        _drop_copied_head(directory, tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


def _drop_copied_head(directory: str | Path, tensors: dict[str, safetensors_io.Tensor]) -> None:
    """Some tools write a tied head out. Raise ValueError where it is not the embedding."""
    for head in [name for name in tensors if name.endswith("lm_head.weight")]:
        embedding = next((t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None)
        if embedding is None or len({*safetensors_io.hashes({"head": tensors[head], "embed": embedding}).values()}) > 1:
            raise ValueError(f"{directory} has a {head} of its own, but tie_word_embeddings is true in its config.json")
        del tensors[head]


def open_tensors(directory: str | Path) -> dict[str, safetensors_io.Tensor]:
    """The tensors of the text model, those that hold no weight of it left out."""
    found = safetensors_io.open_model(directory)
    return {name: tensor for name, tensor in found.items() if not any(part in name for part in names.IGNORED)}


def hashes(directory: str | Path) -> dict[str, str]:
    """sha256 of each tensor that `load_parameters` reads, by its name in the files."""
    return safetensors_io.hashes(open_tensors(directory))


def export(
    parameters: Parameters,
    model: config.Model,
    out_dir: str | Path,
    *,
    dtype: config.Dtype,
    lora: config.Lora | None = None,
    merge: bool = False,
    texts: Texts = NO_TEXTS,
    max_shard_bytes: int = safetensors_io.MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model's directory that transformers, vLLM and llama.cpp load; read it back and compare.

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
    table = names.pieces(model)
    filetype = np.dtype(dtype)
    specs = [safetensors_io.Spec(piece.name, piece.shape, filetype) for piece in table]
    pieces = {piece.name: piece for piece in table}
    settings = write_model_config(
        model,
        dtype=dtype,
        bos_token_id=texts.tokenizer.bos_id if texts.tokenizer else None,
        eos_token_id=texts.tokenizer.eos_id if texts.tokenizer else None,
    )
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def tensor(spec: safetensors_io.Spec) -> np.ndarray:
        return pieces[spec.name].to_file(merging.merged(parameters, lora, pieces[spec.name], filetype))

    check_space(out_dir, sum(safetensors_io.nbytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_io.write_model(directory, specs, tensor, max_shard_bytes)
        write_json(directory / "config.json", settings)
        write_json(directory / "generation_config.json", {"_from_model_config": True, **generation})
        write_texts(directory, texts)
        return proof.check(directory, parameters, model, lora if merge else None, filetype)


def check_space(out_dir: str | Path, needed: int) -> None:
    """Raise OSError before anything is written where the disk has not the room."""
    there = next(path for path in Path(out_dir).absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{out_dir} needs {needed / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free")


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_texts(directory: Path, texts: Texts) -> None:
    for file in texts.tokenizer.files if texts.tokenizer else ():
        shutil.copyfile(file, directory / file.name)
    if texts.chat_template is not None:
        (directory / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    if texts.config is not None:
        (directory / "moe_train.yaml").write_text(texts.config, encoding="utf-8")
