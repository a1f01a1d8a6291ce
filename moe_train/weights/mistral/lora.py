"""Mistral's own adapters: `lora.safetensors` and a `params.json`, as mistral-finetune writes and mistral-inference loads them.

mistral-inference adds scaling · B·A, where scaling is an argument of its own and 2.0 unless stated (`lora.py`, `load_lora`); the
written files are correct for 2.0. It requires one dtype, that of the model, and one rank if it does not merge. B's rows of q
and k are in interleaved rotary order, like the weights'.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.machine.files import check_space, new_directory, read_object
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath, adapter_ranks
from moe_train.weights import merge, names, safetensors_files
from moe_train.weights.arrays import Abstract, LazyParameters, fetch_entry, fill
from moe_train.weights.mistral import params_json
from moe_train.weights.on_disk import FloatDtype, array_bytes
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts

LORA_FILE = "lora.safetensors"
"""Name of an adapter's file of tensors."""
SCALING = 2.0
"""mistral-inference's default scaling, for which files are written."""


def export_adapter(
    parameters: LazyParameters,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    dtype: FloatDtype,
    texts: Texts = NO_TEXTS,
) -> None:
    """Write the adapters of `parameters` as a folder.

    alpha / rank is multiplied into B, and smaller ranks are padded with zeros. `out_dir` appears complete or not at all.
    `proof.prove_adapter` compares the files with `parameters`.

    Args:
        parameters: weights by path.
        model: the architecture of the base.
        lora: the section of the adapters.
        out_dir: the folder to write.
        dtype: the dtype of the base model's files, since mistral-inference accepts no other.
        texts: tokenizer, chat template and config to put beside the adapter.

    Raises:
        ValueError: there are no adapters, or mistral-inference has no place for one.
    """
    ranks = adapter_ranks(parameters)
    if not ranks:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format mistral")
    rank = max(ranks.values())
    file_dtype = np.dtype(dtype)
    table = names.lora_pieces(model, dict.fromkeys(ranks, rank), names.mistral_of(model))
    if unsupported := ranks.keys() - {_module(piece) for piece in table}:
        raise ValueError(f"mistral-inference has no adapters of {sorted(unsupported)[0]}; export with --format mistral --merge")
    if lora.train:
        raise ValueError(
            f"lora.safetensors has no place for {lora.train[0]}, which was trained in full; export with --format mistral --merge"
        )
    pieces = {piece.name: piece for piece in table}
    params = params_json.write_model_config(model)
    # mistral-inference takes scaling as an argument; `read_lora` takes it from here.
    params["lora"] = {"enable": True, "rank": rank, "dropout": 0.0, "scaling": SCALING}

    def tensor(spec: safetensors_files.TensorSpec) -> np.ndarray:
        """Return one tensor of the file, padded with zeros to the common rank."""
        piece = pieces[spec.name]
        values = fetch_entry(parameters[piece.path], piece.lead).astype(np.float64)
        if ParameterPath.parse(piece.path).leaf == "lora_b":
            # mistral-inference multiplies by SCALING, so B carries what remains of the scale.
            values *= merge.scale_of(lora, _module(piece), piece.lead) / SCALING
        # Only the rank can be smaller than the file's. Zeros in A and B add nothing to their product.
        padding = [(0, size - length) for size, length in zip(piece.internal_shape, values.shape, strict=True)]
        return piece.to_file(np.pad(values.astype(file_dtype), padding))

    specs = [safetensors_files.TensorSpec(piece.name, piece.shape, file_dtype) for piece in table]
    check_space(out_dir, sum(array_bytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_files.write_safetensors(directory / LORA_FILE, specs, tensor)
        (directory / params_json.PARAMS_FILE).write_text(json.dumps(params, indent=4) + "\n", encoding="utf-8")
        write_texts(directory, texts)


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """Return the section `lora` that describes the adapter in a folder; scaling comes from params.json, or is 2.0 without it."""
    tensors, scaling = _open(directory)
    layout = names.mistral_of(model)
    weights = [ParameterPath.parse(piece.path) for piece in names.weight_pieces(model, layout)]
    adaptable = {path.module_path for path in weights if not (path.is_norm or path.is_embedding or path.is_head)}
    table = names.lora_pieces(model, dict.fromkeys(adaptable, 1), layout)
    if unknown := sorted(tensors.keys() - {piece.name for piece in table}):
        raise ValueError(
            f"{Path(directory) / LORA_FILE} has {unknown[0]}, which this model has no place for; it is another base's adapter"
        )
    # The first layer and expert with an adapter stand for all: load_adapter refuses a file in which the others differ.
    rank_of: dict[str, int] = {}
    for piece in table:
        path = ParameterPath.parse(piece.path)
        if path.leaf == "lora_a" and piece.name in tensors:
            rank_of.setdefault(path.module, tensors[piece.name].shape[0])
    if not rank_of:
        raise ValueError(f"{Path(directory) / LORA_FILE} has no adapter of this model; export the adapter again")
    targets: dict[int, list[str]] = {}
    for module, rank in rank_of.items():
        targets.setdefault(rank, []).append(module)
    return config.Lora(
        targets=tuple(
            config.LoraTarget(modules=tuple(modules), rank=rank, alpha=scaling * rank) for rank, modules in targets.items()
        )
    )


def load_adapter(directory: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """Read the adapters of a folder into arrays.

    Args:
        directory: the folder.
        model: the architecture of the base.
        abstract: {path of lora_a or lora_b: shape, dtype and sharding}, from a model with the section
            `read_lora(directory, model)`.

    Raises:
        ValueError: the adapter belongs to another base.
    """
    tensors, _ = _open(directory)
    ranks = adapter_ranks(abstract)
    table = names.lora_pieces(model, ranks, names.mistral_of(model))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_file_tensors(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


def _open(directory: str | Path) -> tuple[dict[str, safetensors_files.SafetensorsTensor], float]:
    """Return (tensors, scaling)."""
    directory = Path(directory)
    tensors = safetensors_files.open_safetensors(directory / LORA_FILE)
    params = directory / params_json.PARAMS_FILE
    if not params.is_file():
        return tensors, SCALING
    section = read_object(params).get("lora") or {}
    if not isinstance(section, dict):
        raise ValueError(f"{params}: lora is {section!r}; it has to be an object with a `scaling`")
    scaling = section.get("scaling", SCALING)
    if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not scaling > 0:
        raise ValueError(f"{params}: lora.scaling is {scaling!r}; it has to be a positive number")
    return tensors, float(scaling)


def _module(piece: names.WeightPiece) -> str:
    """Return the path of the module that a weight belongs to."""
    return piece.path.rpartition(".")[0]
