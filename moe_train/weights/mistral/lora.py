"""Mistral's own adapters: `lora.safetensors` and a `params.json`, as mistral-finetune writes them and mistral-inference loads them.

mistral-inference adds scaling · B·A, where scaling is an argument of its own and 2.0 unless stated (`lora.py`,
`load_lora`): what is written is right for 2.0. It wants one dtype, that of the model, and where it does not merge, one
rank. B's rows of q and k are in interleaved rotary order, as the weights' are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.machine.files import new_directory, read_object
from moe_train.model.paths import ParameterPath, adapter_ranks
from moe_train.weights import merge, names, safetensors_files
from moe_train.weights.arrays import Abstract, Held, Parameters, fetch, fill
from moe_train.weights.mistral import params_json
from moe_train.weights.on_disk import nbytes
from moe_train.weights.texts import NO_TEXTS, Texts, check_space, write_texts

FILE = "lora.safetensors"
SCALING = 2.0
_ROUNDED_TWICE = {"float32": 2.0**-22, "bfloat16": 2.0**-7}
"""Of a product of two rounded numbers, the most by which it is off, relative; with room for half as much again."""


def export_adapter(
    parameters: Held,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    dtype: config.Dtype,
    texts: Texts = NO_TEXTS,
) -> dict[str, Any]:
    """Write the adapters of `parameters` as a folder; read it back and compare the deltas.

    dtype: that of the base model's files, since mistral-inference takes no other. alpha / rank goes into B, zeros fill up
    smaller ranks. `out_dir` appears whole, or not at all. Raises ValueError where there are no adapters, or where
    mistral-inference has no place for one.
    """
    ranks = adapter_ranks(parameters)
    if not ranks:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format mistral")
    rank, filetype = max(ranks.values()), np.dtype(dtype)
    table = names.adapter_pieces(model, dict.fromkeys(ranks, rank), names.MISTRAL)
    if elsewhere := ranks.keys() - {_module(piece) for piece in table}:
        raise ValueError(f"mistral-inference reads no adapter of {sorted(elsewhere)[0]}; export with --format mistral --merge")
    if lora.train:
        raise ValueError(
            f"lora.safetensors has no place for {lora.train[0]}, trained in full; export with --format mistral --merge"
        )
    pieces = {piece.name: piece for piece in table}
    params = params_json.write_model_config(model)
    params["lora"] = {"enable": True, "rank": rank, "dropout": 0.0, "scaling": SCALING}

    def tensor(spec: safetensors_files.Spec) -> np.ndarray:
        piece = pieces[spec.name]
        ours = fetch(parameters[piece.path], piece.lead).astype(np.float64)
        if ParameterPath.parse(piece.path).leaf == "lora_b":
            ours *= merge.scale_of(lora, _module(piece), piece.lead) / SCALING
        more = [(0, size - had) for size, had in zip(piece.ours_shape, ours.shape, strict=True)]
        return piece.to_file(np.pad(ours.astype(filetype), more))

    specs = [safetensors_files.Spec(piece.name, piece.shape, filetype) for piece in table]
    check_space(out_dir, sum(nbytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_files.write_file(directory / FILE, specs, tensor)
        (directory / params_json.FILE).write_text(json.dumps(params, indent=4) + "\n", encoding="utf-8")
        write_texts(directory, texts)
        return _prove(directory, table, parameters, lora)


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that the adapter in a folder amounts to; scaling comes from params.json, and is 2.0 without."""
    tensors, scaling = _open(directory)
    targets: dict[int, list[str]] = {}
    for row in names.linear_rows(model.ffn, names.MISTRAL):
        stem = names.MISTRAL.layer.format(l=0) + row.name.format(e=0).removesuffix(".weight")
        if tensor := tensors.get(names.MISTRAL.adapters[0].format(stem=stem)):
            targets.setdefault(tensor.shape[0], []).append(ParameterPath.parse(row.path).module)
    if not targets:
        raise ValueError(f"{Path(directory) / FILE} has no adapter for layer 0 of this model ({next(iter(tensors), 'empty')})")
    modules = {_module(piece) for piece in names.pieces(model, names.MISTRAL) if not ParameterPath.parse(piece.path).is_norm} - {
        "embed",
        "head",
    }
    table = names.adapter_pieces(model, dict.fromkeys(modules, 1), names.MISTRAL)
    if unknown := sorted(tensors.keys() - {piece.name for piece in table}):
        raise ValueError(
            f"{Path(directory) / FILE} has {unknown[0]}, which this model has no place for; it is another base's adapter"
        )
    return config.Lora(
        targets=tuple(
            config.LoraTarget(modules=tuple(modules), rank=rank, alpha=scaling * rank) for rank, modules in targets.items()
        )
    )


def load_adapter(directory: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """The adapters of a folder as arrays like `abstract` ({path of lora_a or lora_b: …}).

    `abstract` comes from a model with the section `read_lora(directory, model)`. Raises ValueError where the adapter is
    of another base.
    """
    tensors, _ = _open(directory)
    ranks = adapter_ranks(abstract)
    table = names.adapter_pieces(model, ranks, names.MISTRAL)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


def _open(directory: str | Path) -> tuple[dict[str, safetensors_files.Tensor], float]:
    """(tensors, scaling)"""
    directory = Path(directory)
    tensors, params = safetensors_files.open_file(directory / FILE), directory / params_json.FILE
    if not params.is_file():
        return tensors, SCALING
    section = read_object(params).get("lora") or {}
    scaling = section.get("scaling", SCALING) if isinstance(section, dict) else section
    if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not scaling > 0:
        raise ValueError(f"{params}: lora.scaling is {scaling!r}; it has to be a positive number")
    return tensors, float(scaling)


def _module(piece: names.Piece) -> str:
    return ParameterPath.parse(piece.path).module_path


def _prove(directory: Path, table: list[names.Piece], parameters: Held, lora: config.Lora) -> dict[str, Any]:
    """Compare the deltas that the files stand for with those in memory, matrix by matrix.

    Returns tensors, parameters, bytes, matrices, and how many of these have a delta of zero. Raises RuntimeError at
    the first difference that rounding A and B to the file's dtype does not explain.
    """
    tensors, scaling = _open(directory)
    names.check(directory, table, {name: tensor.shape for name, tensor in tensors.items()}, {})
    zero = 0
    for of_a, of_b in zip(table[::2], table[1::2], strict=True):
        a, b = (piece.from_file(tensors[piece.name].read).astype(np.float64) for piece in (of_a, of_b))
        written, most = scaling * np.tensordot(a, b, 1), scaling * np.tensordot(np.abs(a), np.abs(b), 1)
        wanted = merge.delta(parameters, lora, replace(of_a, path=f"{_module(of_a)}.weight"))
        assert wanted is not None
        if not np.all(np.abs(written - wanted) <= _ROUNDED_TWICE[tensors[of_a.name].dtype.name] * most):
            raise RuntimeError(f"{of_a.name} and its lora_B are not the adapter of {_module(of_a)}{list(of_a.lead)} in memory")
        zero += not written.any()
    sizes = [(int(np.prod(t.shape)), t.dtype.itemsize) for t in tensors.values()]
    return {
        "tensors": len(tensors),
        "parameters": sum(n for n, _ in sizes),
        "bytes": sum(n * size for n, size in sizes),
        "matrices": len(table) // 2,
        "deltas_of_zero": zero,
    }
