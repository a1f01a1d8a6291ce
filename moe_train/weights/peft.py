"""PEFT adapters: one A and one B per matrix, experts included, as vLLM and PEFT read them.

PEFT under transformers 5 (tried with 0.21.2) turns the experts' files into its fused form while loading. What it
accepts decides what is written: w1, w2 and w3 come together (a gate without its up is refused; both without a down
load with their weights left out, and only a warning); w1 and w3 have the file's own `r` and `lora_alpha`;
a differing w2 is named in the patterns by its old name and by its fused one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.json_file import read_object
from moe_train.weights import hf, names, safetensors_io
from moe_train.weights.arrays import Abstract, Parameters, fetch, fill
from moe_train.weights.merge import scale_of, target_of
from moe_train.weights.on_disk import nbytes
from moe_train.weights.write import NO_TEXTS, Texts, check_space, write_texts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_GATE, _UP, _DOWN = "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"


def export_adapter(
    parameters: Parameters,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    base_model: str,
    texts: Texts = NO_TEXTS,
) -> dict[str, Any]:
    """Write the adapters of `parameters` as a PEFT directory; read it back and compare the deltas.

    base_model: name or path of the model that the adapter belongs to. A and B keep their dtype and their bytes,
    except where experts have to agree (see above): there zeros fill up a smaller rank, and a differing scale
    goes into B. `out_dir` appears whole, or not at all.
    """
    adapted = {path.removesuffix(".lora_a"): a.shape[-1] for path, a in parameters.items() if path.endswith(".lora_a")}
    if not adapted:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format hf")
    shapes = _in_file(model, {module: Shape(rank, target_of(lora, module).alpha) for module, rank in adapted.items()})
    table = names.adapter_pieces(model, {module: shape.rank for module, shape in shapes.items()})
    settings = {**_config(model, shapes), "base_model_name_or_path": base_model}

    def matrix(piece: names.Piece) -> np.ndarray:
        module, kind = piece.path.rsplit(".", 1)
        if piece.path not in parameters:
            return np.zeros(piece.ours_shape, dtype)
        ours, shape = fetch(parameters[piece.path], piece.lead), shapes[module]
        if kind == "lora_b" and (factor := scale_of(lora, module) * shape.rank / shape.alpha) != 1:
            ours = (ours.astype(np.float64) * factor).astype(dtype)
        more = [(0, size - had) for size, had in zip(piece.ours_shape, ours.shape, strict=True)]
        return np.pad(ours, more)

    dtype = np.dtype(next(a.dtype for path, a in parameters.items() if path.endswith(".lora_a")))
    pieces = {piece.name: piece for piece in table}
    specs = [safetensors_io.Spec(piece.name, piece.shape, dtype) for piece in table]
    check_space(out_dir, sum(nbytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_io.write_file(directory / WEIGHTS, specs, lambda spec: pieces[spec.name].to_file(matrix(pieces[spec.name])))
        hf.write_json(directory / CONFIG, settings)
        write_texts(directory, texts)
        return _prove(directory, parameters, model, lora)


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that an adapter of per-expert spelling amounts to. Raises ValueError for what is not built here."""
    directory = Path(directory)
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory with a PEFT adapter")
    settings = read_object(file)
    only = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    only |= dict.fromkeys(("modules_to_save", "target_parameters", "layers_to_transform", "trainable_token_indices"))
    for key, value in only.items():
        if settings.get(key, value) not in (value, [] if value is None else value):
            raise ValueError(f"{file}: {key} is {settings[key]!r}, which is not read here; it has to be {value!r}")
    tensors = safetensors_io.open_file(directory / WEIGHTS)
    targets: dict[tuple[int, float], list[str]] = {}
    for row in names.linear_rows(model):
        stem = "model.layers.0." + row.name.format(e=0).removesuffix(".weight")
        if tensor := tensors.get(names.HUGGING_FACE.adapters[0].format(stem=stem)):
            patterns = settings.get("alpha_pattern") or {}
            alphas = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", stem)]
            rank = tensor.shape[0]
            alpha = float((alphas or [settings["lora_alpha"]])[0])
            scale_up = math.sqrt(rank) if settings.get("use_rslora") else 1.0  # alpha / sqrt(rank)
            targets.setdefault((rank, alpha * scale_up), []).append(row.path.removesuffix(".weight"))
    if not targets:
        raise ValueError(
            f"{directory / WEIGHTS} has no adapter for layer 0 in a spelling that is read here ({next(iter(tensors), 'empty')})"
        )
    return config.Lora(targets=tuple(config.LoraTarget(modules=tuple(m), rank=r, alpha=alpha) for (r, alpha), m in targets.items()))


def load_adapter(directory: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """The adapters of a PEFT directory as arrays like `abstract` ({path of lora_a or lora_b: …}).

    `abstract` comes from a model with the section `read_lora(directory, model)`.
    """
    tensors = safetensors_io.open_file(Path(directory) / WEIGHTS)
    ranks = {path.removesuffix(".lora_a"): like.shape[-1] for path, like in abstract.items() if path.endswith(".lora_a")}
    table = names.adapter_pieces(model, ranks)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


# --- what the file looks like ------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a module's adapter in the file; its scale is alpha / rank."""

    rank: int
    alpha: float


def _in_file(model: config.Model, ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Adapters by module as the file has them: of experts all three matrices, gate and up alike."""
    shapes = dict(ours)
    if isinstance(model.ffn, config.DenseFfn):
        return shapes
    for layer in sorted({module.removesuffix(name) for module in ours for name in (_GATE, _UP, _DOWN) if module.endswith(name)}):
        gate, up, down = (layer + name for name in (_GATE, _UP, _DOWN))
        shapes[gate] = shapes[up] = max(ours[m] for m in ((gate, up) if {gate, up} & ours.keys() else (down,)) if m in ours)
        shapes.setdefault(down, shapes[gate])
    return shapes


def _config(model: config.Model, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """adapter_config.json without the base model's name."""
    leaves = {row.path.removesuffix(".weight"): row.name.split(".")[-2] for row in names.linear_rows(model)}
    of_layer = {".".join(module.split(".")[-2:]): shape for module, shape in shapes.items()}  # alike in every layer
    sparse = isinstance(model.ffn, config.MoeFfn)
    usual = of_layer[_GATE] if sparse and _GATE in of_layer else Counter(of_layer.values()).most_common(1)[0][0]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, shape in of_layer.items():
        for key in (leaves[module], "experts.down_proj") if sparse and module == _DOWN else (leaves[module],):
            if shape.rank != usual.rank:
                ranks[key] = shape.rank
            if shape.alpha != usual.alpha:
                alphas[key] = _number(shape.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual.rank,
        "lora_alpha": _number(usual.alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted({leaves[module] for module in of_layer}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _number(x: float) -> int | float:
    """PEFT says int, and takes a float where it has to be one."""
    return int(x) if x.is_integer() else x


def _prove(directory: Path, parameters: Mapping[str, jax.Array], model: config.Model, lora: config.Lora) -> dict[str, Any]:
    """Compare the deltas that the files stand for with those in memory, matrix by matrix.

    Returns tensors, parameters, bytes, matrices, and how many of these have a delta of zero. Raises RuntimeError at
    the first difference.
    """
    tensors, read = safetensors_io.open_file(directory / WEIGHTS), read_lora(directory, model)
    places = [f"stacks.0.layers.{j}" for j in range(len(model.attention.windows))]
    in_file = {f"{place}.{module}": t.rank for place in places for t in read.targets for module in t.modules}
    in_memory = {path.removesuffix(".lora_a") for path in parameters if path.endswith(".lora_a")}
    table = names.adapter_pieces(model, in_file)
    if {piece.name for piece in table} != set(tensors) or in_memory - set(in_file):
        raise RuntimeError(f"{directory / WEIGHTS} does not hold the adapters of {', '.join(sorted(in_memory))}")

    def product(section: config.Lora, module: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rank = b.shape[0]
        return scale_of(section, module) * (a.reshape(-1, rank).astype(np.float64) @ b.reshape(rank, -1).astype(np.float64))

    zero = 0
    for a, b in zip(table[::2], table[1::2], strict=True):
        module = a.path.removesuffix(".lora_a")
        written = product(read, module, *(piece.from_file(tensors[piece.name].read) for piece in (a, b)))
        wanted = np.zeros(())
        if module in in_memory:
            wanted = product(lora, module, *(fetch(parameters[piece.path], piece.lead) for piece in (a, b)))
        limit = {"float32": 2.0**-22, "bfloat16": 2.0**-7}[tensors[a.name].dtype.name] * np.abs(wanted).max()
        if not np.all(np.abs(written - wanted) <= limit):
            raise RuntimeError(f"{a.name} and its lora_B are not the adapter of {module}{list(a.lead)} in memory")
        zero += not written.any()
    sizes = [(int(np.prod(t.shape)), t.dtype.itemsize) for t in tensors.values()]
    return {
        "tensors": len(tensors),
        "parameters": sum(n for n, _ in sizes),
        "bytes": sum(n * size for n, size in sizes),
        "matrices": len(table) // 2,
        "deltas_of_zero": zero,
    }
