"""PEFT's adapters, read."""

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
from moe_train.machine.files import read_object
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import names, on_disk, safetensors_files
from moe_train.weights.arrays import Abstract, Parameters, fill
from moe_train.weights.on_disk import Tensor
from moe_train.weights.peft import fused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


_GATE, _UP, _DOWN = "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"


_ROUTER = ("block_sparse_moe.gate", "mlp.gate")
"""A router in a per-expert file, and as transformers 5 has it; LoRA's tensors are renamed in PEFT, saved modules' are not."""


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that an adapter amounts to, per-expert or fused. Raises ValueError for what is not built here."""
    directory = Path(directory)
    settings, tensors, file = _settings(directory), _open(directory, model), directory / CONFIG
    if settings.get("target_parameters"):
        settings["alpha_pattern"] = fused.alpha_pattern(settings, model)
    kinds: dict[str, dict[tuple[int, float], set[int]]] = {}  # of each module: (rank, alpha) -> the experts that have it
    firsts: dict[tuple[str, int], tuple[str, tuple[int, float]]] = {}
    layers: Counter[tuple[str, int]] = Counter()
    every = _every_adapter(model)
    num_layers = Counter(_module_and_expert(piece) for piece in every[::2])
    for piece, other in zip(every[::2], every[1::2], strict=True):
        if (piece.name in tensors) != (other.name in tensors):
            raise ValueError(f"{directory / WEIGHTS} lacks {(piece if other.name in tensors else other).name}")
        if (tensor := tensors.get(piece.name)) is None:
            continue
        stem = piece.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        found = _rank_and_alpha(settings, stem, tensor)
        module, expert = _module_and_expert(piece)
        kinds.setdefault(module, {}).setdefault(found, set()).add(expert)
        layers[module, expert] += 1
        first, same = firsts.setdefault((module, expert), (stem, found))
        if same != found:
            raise ValueError(f"{file}: {stem} has rank and alpha {found}, {first} has {same}; here a module has one in all layers")
    for (module, expert), count in layers.items():
        if count < (total := num_layers[module, expert]):
            stem = firsts[module, expert][0]
            raise ValueError(f"{file}: adapters such as {stem}'s are in {count} of {total} layers; here it is all of them")
    if not kinds:
        raise ValueError(f"{directory / WEIGHTS} has no adapter in a spelling that is read here ({next(iter(tensors), 'empty')})")
    if unknown := sorted(tensors.keys() - {piece.name for piece in (*every, *_saved(model))}):
        raise ValueError(f"{directory / WEIGHTS} has {unknown[0]}, which this model has no place for; it is another base's adapter")
    experts = model.ffn.num_experts if isinstance(model.ffn, config.MoeFfn) else 1
    targets: dict[tuple[tuple[int, float], tuple[int, ...] | None], list[str]] = {}
    for module, experts_by_kind in kinds.items():
        for kind, owners in experts_by_kind.items():
            all_of_them = len(owners) == (experts if module in (_GATE, _UP, _DOWN) else 1)
            targets.setdefault((kind, None if all_of_them else tuple(sorted(owners))), []).append(module)
    saved = {
        piece.name.removesuffix(".weight"): ParameterPath.parse(piece.path).module
        for piece in _saved(model)
        if piece.name in tensors
    }
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
    ranks = adapter_ranks(abstract)
    saved = [piece for piece in _saved(model) if piece.path in abstract]
    if model.tie_embeddings:
        saved = [piece for piece in saved if piece.name != _tied_head(model).name]
        tensors.pop(_tied_head(model).name, None)
    table = [*names.adapter_pieces(model, ranks), *saved]
    lora = read_lora(directory, model)
    shared = {m for m in ranks if any(target.experts is not None for target in lora.targets_of(of_module(m).module))}
    filled: dict[str, Tensor] = dict(tensors)
    for piece in table:
        if ParameterPath.parse(piece.path).module_path in shared:
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
    for name, tensor in safetensors_files.open_file(directory / WEIGHTS).items():
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
        return fused.split(directory / WEIGHTS, found, model, read_object(directory / CONFIG).get("peft_version"))
    return found


def _module_and_expert(piece: names.Piece) -> tuple[str, int]:
    return ParameterPath.parse(piece.path).module, piece.lead[1] if len(piece.lead) == 2 else 0


def _every_adapter(model: config.Model) -> list[names.Piece]:
    """A and B of everything that can have an adapter; their rank means nothing."""
    paths = [ParameterPath.parse(piece.path) for piece in names.pieces(model)]
    modules = {path.module_path for path in paths if not path.is_norm}
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
    (embed,) = (piece for piece in names.pieces(model) if ParameterPath.parse(piece.path).is_embedding)
    return replace(embed, name=f"base_model.model.{names.HUGGING_FACE.head.name}")
