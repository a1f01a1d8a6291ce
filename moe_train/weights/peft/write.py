"""PEFT adapters: one A and one B per matrix, experts included, as vLLM and PEFT read them.

PEFT under transformers 5 (tried with 0.21.2) turns the experts' files into its fused form while loading. What it
accepts decides what is written: w1, w2 and w3 come together (a gate without its up is refused; both without a down
load with their weights left out, and only a warning); w1 and w3 have the file's own `r` and `lora_alpha`;
a differing w2 is named in the patterns by its old name and by its fused one; all experts of a matrix share rank and
scale, so zeros fill up a smaller rank and B takes up a differing scale. Scales are said as lora_alpha / r, rank-stabilised
ones too: PEFT's fusing of gate and up, and llama.cpp, know no other. Dropout is stated where PEFT has it, which is not
beside experts or a router. What was trained in full is `modules_to_save`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.machine.files import new_directory
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import hf, merge, names, safetensors_files
from moe_train.weights.arrays import Held, fetch
from moe_train.weights.on_disk import nbytes
from moe_train.weights.peft.read import _DOWN, _GATE, _UP, CONFIG, WEIGHTS, _every_adapter, _saved, read_lora
from moe_train.weights.serve import Server, Shape, adapter_shapes
from moe_train.weights.texts import NO_TEXTS, Texts, check_space, write_texts


def export_adapter(
    parameters: Held,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    base_model: str,
    texts: Texts = NO_TEXTS,
    server: Server | None = None,
) -> dict[str, Any]:
    """Write the adapters of `parameters`, and what was trained in full beside them, as a PEFT directory; read it back and
    compare.

    base_model: name or path of the model that the adapter belongs to. A and B keep their dtype and their bytes,
    except where experts have to agree (see above), or all modules for the sake of `server` (see `serve`). `out_dir`
    appears whole, or not at all. Raises ValueError for what PEFT, or the server, has no word for.
    """
    adapted = adapter_ranks(parameters)
    if not adapted:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format hf")
    shapes = _in_file(model, {module: _shape(lora, module, rank) for module, rank in adapted.items()})
    saved = _saved_pieces(model, lora)
    if server is not None:
        shapes = adapter_shapes(server, model.family, shapes, {ParameterPath.parse(piece.path).module_path for piece in saved})
    table = names.adapter_pieces(model, {module: shape.rank for module, shape in shapes.items()})
    settings = {**_config(model, shapes, lora), "base_model_name_or_path": base_model}

    def matrix(piece: names.Piece) -> np.ndarray:
        path = ParameterPath.parse(piece.path)
        if piece in saved:
            return fetch(parameters[piece.path], piece.lead)
        if piece.path not in parameters:
            return np.zeros(piece.ours_shape, dtype)
        ours, shape = fetch(parameters[piece.path], piece.lead), shapes[path.module_path]
        if path.leaf == "lora_b" and (factor := merge.scale_of(lora, path.module_path, piece.lead) * shape.rank / shape.alpha) != 1:
            ours = (ours.astype(np.float64) * factor).astype(dtype)
        more = [(0, size - had) for size, had in zip(piece.ours_shape, ours.shape, strict=True)]
        return np.pad(ours, more)

    dtype = np.dtype(parameters[f"{next(iter(adapted))}.lora_a"].dtype)
    pieces = {piece.name: piece for piece in (*table, *saved)}
    specs = [safetensors_files.Spec(piece.name, piece.shape, dtype) for piece in table]
    specs += [safetensors_files.Spec(piece.name, piece.shape, np.dtype(parameters[piece.path].dtype)) for piece in saved]
    check_space(out_dir, sum(nbytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_files.write_file(directory / WEIGHTS, specs, lambda spec: pieces[spec.name].to_file(matrix(pieces[spec.name])))
        hf.write_json(directory / CONFIG, settings)
        write_texts(directory, texts)
        return _prove(directory, parameters, model, lora)


# --- what is in a file -------------------------------------------------------------------------------------------


# --- what the file looks like ------------------------------------------------------------------------------------


def _shape(lora: config.Lora, module: str, rank: int) -> Shape:
    """alpha is what the first target's scale amounts to at the rank of the stack."""
    target = merge.target_of(lora, module)
    return Shape(rank, target.alpha if rank == target.rank and not lora.rslora else lora.scale(target) * rank)


def _saved_pieces(model: config.Model, lora: config.Lora) -> list[names.Piece]:
    """What was trained in full. Raises ValueError for experts, which PEFT under transformers 5 knows as one fused module."""
    paths = {piece.path for piece in names.pieces(model) if ParameterPath.parse(piece.path).is_trained(lora)}
    saved = [piece for piece in _saved(model) if piece.path in paths]
    if experts := sorted(ParameterPath.parse(path).module for path in paths - {piece.path for piece in saved}):
        raise ValueError(
            f"{experts[0]} was trained in full, and PEFT's modules_to_save has all matrices of all experts or none; "
            "use --format hf --merge"
        )
    return saved


def _in_file(model: config.Model, ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Adapters by module as the file has them: of experts all three matrices, gate and up alike."""
    shapes = dict(ours)
    if isinstance(model.ffn, config.DenseFfn):
        return shapes
    routed = [path for path in map(of_module, sorted(ours)) if path.is_expert(model)]
    layers = {(path.stack, path.place): path for path in routed}
    for path in layers.values():
        gate, up, down = (replace(path, module=name).module_path for name in (_GATE, _UP, _DOWN))
        shapes[gate] = shapes[up] = max(ours[m] for m in ((gate, up) if {gate, up} & ours.keys() else (down,)) if m in ours)
        shapes.setdefault(down, shapes[gate])
    return shapes


def _config(model: config.Model, shapes: Mapping[str, Shape], lora: config.Lora) -> dict[str, Any]:
    """adapter_config.json without the base model's name."""
    leaves = {ParameterPath.parse(piece.path).module: piece.name.split(".")[-2] for piece in names.pieces(model)}
    of_model = {of_module(module).module: shape for module, shape in shapes.items()}  # alike in every layer
    sparse = isinstance(model.ffn, config.MoeFfn)
    usual = of_model[_GATE] if sparse and _GATE in of_model else Counter(of_model.values()).most_common(1)[0][0]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    as_parameter = {_DOWN: "experts.down_proj", "ffn.router": "gate.weight"} if sparse else {}  # transformers 5's names
    for module, shape in of_model.items():
        for key in (leaves[module], *([as_parameter[module]] if module in as_parameter else [])):
            if shape.rank != usual.rank:
                ranks[key] = shape.rank
            if shape.alpha != usual.alpha:
                alphas[key] = _number(shape.alpha)
    without_dropout = sparse and of_model.keys() & {_GATE, "ffn.router"}
    saved = {piece.name.removeprefix("base_model.model.").removesuffix(".weight") for piece in _saved_pieces(model, lora)}
    tied = model.tie_embeddings and "lm_head" in saved  # PEFT names one end, and keeps both
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual.rank,
        "lora_alpha": _number(usual.alpha),
        "lora_dropout": 0.0 if without_dropout else lora.dropout,
        "target_modules": sorted({leaves[module] for module in of_model}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        # of a layer's modules the name inside the layer: `norm` alone would end input_layernorm too
        "modules_to_save": sorted({re.sub(r"^model\.layers\.\d+\.", "", name) for name in saved - ({"lm_head"} if tied else set())})
        or None,
        **({"ensure_weight_tying": True} if tied else {}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _number(x: float) -> int | float:
    """PEFT says int, and takes a float where it has to be one."""
    return int(x) if x.is_integer() else x


# --- the proof ---------------------------------------------------------------------------------------------------


def _prove(directory: Path, parameters: Held, model: config.Model, lora: config.Lora) -> dict[str, Any]:
    """Compare the deltas that the files stand for with those in memory, matrix by matrix; saved modules bit for bit.

    Returns tensors, parameters, bytes, matrices, and how many of these have a delta of zero. Raises RuntimeError at
    the first difference.
    """
    tensors, read = safetensors_files.open_file(directory / WEIGHTS), read_lora(directory, model)
    ranks = {
        module: targets[0].rank
        for module in {ParameterPath.parse(piece.path).module_path for piece in _every_adapter(model)}
        if (targets := read.targets_of(of_module(module).module))
    }
    table, saved = names.adapter_pieces(model, ranks), _saved_pieces(model, lora)
    missing = {path for path in parameters if ParameterPath.parse(path).is_trained(lora)} - {
        piece.path for piece in (*table, *saved)
    }
    if {piece.name for piece in (*table, *saved)} != set(tensors) or missing:
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was trained: {', '.join(sorted(missing))}")
    zero = 0
    for a, b in zip(table[::2], table[1::2], strict=True):
        module = ParameterPath.parse(a.path).module_path
        in_a, in_b = (piece.from_file(tensors[piece.name].read).astype(np.float64) for piece in (a, b))
        written = merge.scale_of(read, module, a.lead) * np.tensordot(in_a, in_b, 1)
        wanted = merge.delta(parameters, lora, replace(a, path=f"{module}.weight"))
        wanted = np.zeros(()) if wanted is None else wanted.T if module == "head" else wanted
        limit = {"float32": 2.0**-22, "bfloat16": 2.0**-7}[tensors[a.name].dtype.name] * np.abs(wanted).max()
        if not np.all(np.abs(written - wanted) <= limit):
            raise RuntimeError(f"{a.name} and its lora_B are not the adapter of {module}{list(a.lead)} in memory")
        zero += not written.any()
    for piece in saved:
        if not np.array_equal(piece.from_file(tensors[piece.name].read), fetch(parameters[piece.path], piece.lead)):
            raise RuntimeError(f"{piece.name} is not {piece.path}{list(piece.lead)} in memory")
    sizes = [(math.prod(t.shape), t.dtype.itemsize) for t in tensors.values()]
    return {
        "tensors": len(tensors),
        "parameters": sum(n for n, _ in sizes),
        "bytes": sum(n * size for n, size in sizes),
        "matrices": len(table) // 2,
        "deltas_of_zero": zero,
    }
