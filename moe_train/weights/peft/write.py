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
from typing import Any, NamedTuple

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.json_file import read_object
from moe_train.model.lora import is_trainable, module_of, targets_of
from moe_train.weights import hf, merge, names, on_disk, peft_fused, safetensors_io
from moe_train.weights.arrays import Abstract, Held, Parameters, fetch, fill
from moe_train.weights.on_disk import Tensor, nbytes
from moe_train.weights.serve import Server, Shape, adapter_shapes
from moe_train.weights.write import NO_TEXTS, Texts, check_space, write_texts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_GATE, _UP, _DOWN = "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"
_ROUTER = ("block_sparse_moe.gate", "mlp.gate")
"""A router in a per-expert file, and as transformers 5 has it; LoRA's tensors are renamed in PEFT, saved modules' are not."""


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
    adapted = [path.removesuffix(".lora_a") for path in parameters if path.endswith(".lora_a")]
    if not adapted:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format hf")
    shapes = _in_file(model, {module: _shape(lora, module, parameters[f"{module}.lora_a"].shape[-1]) for module in adapted})
    saved = _saved_pieces(model, lora)
    if server is not None:
        shapes = adapter_shapes(server, model.family, shapes, {piece.path.rpartition(".")[0] for piece in saved})
    table = names.adapter_pieces(model, {module: shape.rank for module, shape in shapes.items()})
    settings = {**_config(model, shapes, lora), "base_model_name_or_path": base_model}

    def matrix(piece: names.Piece) -> np.ndarray:
        module, kind = piece.path.rsplit(".", 1)
        if piece in saved:
            return fetch(parameters[piece.path], piece.lead)
        if piece.path not in parameters:
            return np.zeros(piece.ours_shape, dtype)
        ours, shape = fetch(parameters[piece.path], piece.lead), shapes[module]
        if kind == "lora_b" and (factor := merge.scale_of(lora, module, piece.lead) * shape.rank / shape.alpha) != 1:
            ours = (ours.astype(np.float64) * factor).astype(dtype)
        more = [(0, size - had) for size, had in zip(piece.ours_shape, ours.shape, strict=True)]
        return np.pad(ours, more)

    dtype = np.dtype(parameters[f"{adapted[0]}.lora_a"].dtype)
    pieces = {piece.name: piece for piece in (*table, *saved)}
    specs = [safetensors_io.Spec(piece.name, piece.shape, dtype) for piece in table]
    specs += [safetensors_io.Spec(piece.name, piece.shape, np.dtype(parameters[piece.path].dtype)) for piece in saved]
    check_space(out_dir, sum(nbytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_io.write_file(directory / WEIGHTS, specs, lambda spec: pieces[spec.name].to_file(matrix(pieces[spec.name])))
        hf.write_json(directory / CONFIG, settings)
        write_texts(directory, texts)
        return _prove(directory, parameters, model, lora)


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that an adapter amounts to, per-expert or fused. Raises ValueError for what is not built here."""
    directory = Path(directory)
    settings, tensors, file = _settings(directory), _open(directory, model), directory / CONFIG
    if settings.get("target_parameters"):
        settings["alpha_pattern"] = peft_fused.alpha_pattern(settings, model)
    kinds: dict[str, dict[tuple[int, float], set[int]]] = {}  # of each module: (rank, alpha) -> the experts that have it
    firsts: dict[tuple[str, int], tuple[str, tuple[int, float]]] = {}
    layers: Counter[tuple[str, int]] = Counter()
    every = _every_adapter(model)
    for piece, other in zip(every[::2], every[1::2], strict=True):
        if (piece.name in tensors) != (other.name in tensors):
            raise ValueError(f"{directory / WEIGHTS} lacks {(piece if other.name in tensors else other).name}")
        if (tensor := tensors.get(piece.name)) is None:
            continue
        stem = piece.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        found = _rank_and_alpha(settings, stem, tensor)
        module, expert = module_of(piece.path), piece.lead[1] if len(piece.lead) == 2 else 0
        kinds.setdefault(module, {}).setdefault(found, set()).add(expert)
        layers[module, expert] += 1
        first, same = firsts.setdefault((module, expert), (stem, found))
        if same != found:
            raise ValueError(f"{file}: {stem} has rank and alpha {found}, {first} has {same}; here a module has one in all layers")
    for (module, expert), count in layers.items():
        if module not in config.NAMED_IN_FULL[1:] and count < model.num_layers:
            stem = firsts[module, expert][0]
            raise ValueError(
                f"{file}: adapters such as {stem}'s are in {count} of {model.num_layers} layers; here it is all of them"
            )
    if not kinds:
        raise ValueError(f"{directory / WEIGHTS} has no adapter in a spelling that is read here ({next(iter(tensors), 'empty')})")
    if unknown := sorted(tensors.keys() - {piece.name for piece in (*every, *_saved(model))}):
        raise ValueError(f"{directory / WEIGHTS} has {unknown[0]}, which this model has no place for; it is another base's adapter")
    experts = model.ffn.num_experts if isinstance(model.ffn, config.MoeFfn) else 1
    targets: dict[tuple[tuple[int, float], tuple[int, ...] | None], list[str]] = {}
    for module, of_module in kinds.items():
        for kind, owners in of_module.items():
            all_of_them = len(owners) == (experts if module in (_GATE, _UP, _DOWN) else 1)
            targets.setdefault((kind, None if all_of_them else tuple(sorted(owners))), []).append(module)
    saved = {piece.name.removesuffix(".weight"): module_of(piece.path) for piece in _saved(model) if piece.name in tensors}
    for module in settings.get("modules_to_save") or ():
        if not any(name.endswith(module) for name in saved):
            raise ValueError(f"{file}: modules_to_save has {module!r}, and {WEIGHTS} has no weight of it")
    if model.tie_embeddings and "embed" in saved.values():
        ends = {name: tensors[f"{name}.weight"] for name, module in saved.items() if module == "embed"}
        if len(ends) < 2 or len(set(on_disk.hashes(ends).values())) > 1:
            raise ValueError(
                f"{file}: {min(ends)} was trained apart from the other end, and this model has one table for both; PEFT keeps them "
                "alike with ensure_weight_tying"
            )
    return config.Lora(
        targets=tuple(
            config.LoraTarget(modules=tuple(modules), rank=rank, alpha=alpha, experts=owners)
            for ((rank, alpha), owners), modules in targets.items()
        ),
        rslora=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        train=tuple(sorted(set(saved.values()))),
    )


def load_adapter(directory: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """The adapters of a PEFT directory, and its modules_to_save, as arrays like `abstract` ({path: …}).

    `abstract` comes from a model with the section `read_lora(directory, model)`; ranks that are smaller than the stack's
    are filled up with zeros. Raises ValueError where the files have other tensors than the section says.
    """
    tensors = _open(Path(directory), model)
    ranks = {path.removesuffix(".lora_a"): like.shape[-1] for path, like in abstract.items() if path.endswith(".lora_a")}
    saved = [piece for piece in _saved(model) if piece.path in abstract]
    if model.tie_embeddings:
        saved = [piece for piece in saved if piece.name != _tied_head(model).name]
        tensors.pop(_tied_head(model).name, None)
    table = [*names.adapter_pieces(model, ranks), *saved]
    lora = read_lora(directory, model)
    shared = {m for m in ranks if any(target.experts is not None for target in targets_of(lora, module_of(f"{m}.weight")))}
    filled: dict[str, Tensor] = dict(tensors)
    for piece in table:
        if piece.path.rpartition(".")[0] in shared:
            filled[piece.name] = _Filled(piece.name, piece.shape, tensors.get(piece.name))
    names.check(
        directory, table, {name: t.shape for name, t in filled.items()}, {path: like.shape for path, like in abstract.items()}
    )
    return fill(abstract, table, filled)


class _Filled(NamedTuple):
    """A matrix of a file, or none, with zeros up to a shape."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.tensor is None else self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        whole = np.zeros(self.shape, self.dtype)
        if self.tensor is not None:
            whole[tuple(slice(size) for size in self.tensor.shape)] = self.tensor.read()
        return whole[index]


# --- what is in a file -------------------------------------------------------------------------------------------


def _settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json, without anything that is not read here."""
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory with a PEFT adapter")
    settings = read_object(file)
    for key in ("target_parameters", "modules_to_save"):
        if not isinstance(given := settings.get(key) or [], list) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"{file}: {key} is {given!r}; it has to be a list of names")
    if not isinstance(patterns := settings.get("alpha_pattern") or {}, dict):
        raise ValueError(f"{file}: alpha_pattern is {patterns!r}; it has to be an object")
    for key, alpha in {"lora_alpha": settings.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ValueError(f"{file}: {key} is {alpha!r}; an alpha is a positive number")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{file}: alpha_pattern has {key!r}, which is no pattern: {error}") from error
    only = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False}
    only |= dict.fromkeys(("layers_to_transform", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"))
    for key, value in only.items():
        if settings.get(key, value) not in (value, [] if value is None else value):
            raise ValueError(f"{file}: {key} is {settings[key]!r}, which is not read here; it has to be {value!r}")
    known = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    if unknown := [name for name in settings.get("target_parameters") or () if not name.endswith(known)]:
        raise ValueError(f"{file}: target_parameters has {unknown[0]!r}; read are those that end in {', '.join(known)}")
    return settings


def _open(directory: Path, model: config.Model) -> dict[str, Tensor]:
    """Tensors by the names of a per-expert file; without the copies of the base that PEFT puts beside adapted ends."""
    found: dict[str, Tensor] = {}
    sizes = {"model.embed_tokens": (model.vocab_size, model.model_dim), "lm_head": (model.vocab_size, model.model_dim)}
    for name, tensor in safetensors_io.open_file(directory / WEIGHTS).items():
        stem = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        if name.endswith(".base_layer.weight") and stem in sizes:
            if tensor.shape != sizes[stem]:
                raise ValueError(
                    f"{directory / WEIGHTS}: {name} has shape {tensor.shape}, the base's is {sizes[stem]}: another vocabulary"
                )
            continue
        if isinstance(model.ffn, config.MoeFfn) and ".lora_" in name:
            name = name.replace(f".{_ROUTER[1]}.", f".{_ROUTER[0]}.")
        found[name] = tensor
    if isinstance(model.ffn, config.MoeFfn):
        return peft_fused.split(directory / WEIGHTS, found, model, read_object(directory / CONFIG).get("peft_version"))
    return found


def _every_adapter(model: config.Model) -> list[names.Piece]:
    """A and B of everything that can have an adapter; their rank means nothing."""
    modules = {piece.path.rpartition(".")[0] for piece in names.pieces(model) if not piece.path.endswith(".scale")}
    return names.adapter_pieces(model, dict.fromkeys(modules, 1))


def _rank_and_alpha(settings: Mapping[str, Any], stem: str, lora_a: Tensor) -> tuple[int, float]:
    patterns = settings.get("alpha_pattern") or {}
    alphas = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", stem)]
    return lora_a.shape[0], float((alphas or [settings["lora_alpha"]])[0])


def _saved(model: config.Model) -> list[names.Piece]:
    """Everything that modules_to_save can hold: whole weights, under the names that PEFT gives them."""
    found = []
    for piece in names.pieces(model):
        if len(piece.lead) < 2:
            found.append(replace(piece, name="base_model.model." + piece.name.replace(f"{_ROUTER[0]}.", f"{_ROUTER[1]}.")))
    return found + ([_tied_head(model)] if model.tie_embeddings else [])


def _tied_head(model: config.Model) -> names.Piece:
    """The name under which a tied table is written once more."""
    (embed,) = (piece for piece in names.pieces(model) if piece.path == "embed.weight")
    return replace(embed, name=f"base_model.model.{names.HUGGING_FACE.head.name}")


# --- what the file looks like ------------------------------------------------------------------------------------


def _shape(lora: config.Lora, module: str, rank: int) -> Shape:
    """alpha is what the first target's scale amounts to at the rank of the stack."""
    target = merge.target_of(lora, module)
    return Shape(rank, target.alpha if rank == target.rank and not lora.rslora else lora.scale(target) * rank)


def _saved_pieces(model: config.Model, lora: config.Lora) -> list[names.Piece]:
    """What was trained in full. Raises ValueError for experts, which PEFT under transformers 5 knows as one fused module."""
    paths = {piece.path for piece in names.pieces(model) if is_trainable(piece.path, lora)}
    saved = [piece for piece in _saved(model) if piece.path in paths]
    if experts := sorted(module_of(path) for path in paths - {piece.path for piece in saved}):
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
    for layer in sorted({module.removesuffix(name) for module in ours for name in (_GATE, _UP, _DOWN) if module.endswith(name)}):
        gate, up, down = (layer + name for name in (_GATE, _UP, _DOWN))
        shapes[gate] = shapes[up] = max(ours[m] for m in ((gate, up) if {gate, up} & ours.keys() else (down,)) if m in ours)
        shapes.setdefault(down, shapes[gate])
    return shapes


def _config(model: config.Model, shapes: Mapping[str, Shape], lora: config.Lora) -> dict[str, Any]:
    """adapter_config.json without the base model's name."""
    leaves = {module_of(piece.path): piece.name.split(".")[-2] for piece in names.pieces(model)}
    of_model = {module_of(f"{module}.weight"): shape for module, shape in shapes.items()}  # alike in every layer
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
    tensors, read = safetensors_io.open_file(directory / WEIGHTS), read_lora(directory, model)
    ranks = {
        module: targets[0].rank
        for module in {piece.path.rpartition(".")[0] for piece in _every_adapter(model)}
        if (targets := targets_of(read, module_of(f"{module}.weight")))
    }
    table, saved = names.adapter_pieces(model, ranks), _saved_pieces(model, lora)
    missing = {path for path in parameters if is_trainable(path, lora)} - {piece.path for piece in (*table, *saved)}
    if {piece.name for piece in (*table, *saved)} != set(tensors) or missing:
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was trained: {', '.join(sorted(missing))}")
    zero = 0
    for a, b in zip(table[::2], table[1::2], strict=True):
        module = a.path.removesuffix(".lora_a")
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
