"""Adapters of a tower and its projector in PEFT files, whose base is the whole wrapper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath, of_module
from moe_train.weights.names import WeightPiece
from moe_train.weights.serve import AdapterShape
from moe_train.weights.wrappers import tower_pieces

_PREFIX = "base_model.model."


class Tower(NamedTuple):
    """What PEFT files have of a tower and its projector."""

    shapes: Mapping[str, AdapterShape]
    """Rank and alpha by the regular expression of the whole names of modules on the wrapper."""
    adapters: list[WeightPiece]
    """A and B of each adapter."""
    saved: list[WeightPiece]
    """Weights that were trained in full."""


def tower_adapters(shapes: Mapping[str, AdapterShape]) -> dict[str, AdapterShape]:
    """Return the adapters of a tower and its projector among those of a model, by module path."""
    return {module: shape for module, shape in shapes.items() if of_module(module).is_tower}


def adaptable_tower(encoder: config.Encoder, model: config.Model) -> list[WeightPiece]:
    """List A and B, in turn, of every weight of a tower that can have an adapter; their rank is a placeholder."""
    modules = {ParameterPath.parse(piece.path).module for piece in tower_pieces.pieces_in_memory(encoder, model)}
    return tower_pieces.adapter_pieces(encoder, model, dict.fromkeys(modules, 1))


def saved_tower(encoder: config.Encoder, model: config.Model) -> list[WeightPiece]:
    """List every full weight of a tower that modules_to_save can contain."""
    return [replace(piece, name=f"{_PREFIX}{piece.name}") for piece in tower_pieces.pieces_in_memory(encoder, model)]


def tower_of(encoder: config.Encoder, model: config.Model, lora: config.Lora, shapes: Mapping[str, AdapterShape]) -> Tower:
    """Return what PEFT files have of a tower.

    Args:
        encoder: sizes of the tower.
        model: the text model.
        lora: the section of the adapters.
        shapes: rank and alpha of the tower's modules that have an adapter.
    """
    by_pattern: dict[str, AdapterShape] = {}
    saved: list[WeightPiece] = []
    for piece in tower_pieces.pieces_in_memory(encoder, model):
        path = ParameterPath.parse(piece.path)
        if path.is_trained(lora):
            saved.append(replace(piece, name=f"{_PREFIX}{piece.name}"))
        elif path.module in shapes and path.leaf == "weight":
            name = re.escape(piece.name.removesuffix(".weight"))
            by_pattern[re.sub(r"layers\\\.\d+", r"layers\\.\\d+", name)] = shapes[path.module]
    ranks = {module: shape.rank for module, shape in shapes.items()}
    return Tower(by_pattern, tower_pieces.adapter_pieces(encoder, model, ranks), saved)


def with_tower(settings: JsonObject, tower: Tower) -> JsonObject:
    """Return adapter_config.json with what the tower has, given that of the text model."""
    changed = dict(settings)
    if tower.shapes:
        targets = settings["target_modules"]
        of_text = [targets] if isinstance(targets, str) else [rf"(.*\.)?({re.escape(name)})" for name in targets]
        changed["target_modules"] = "|".join([*of_text, *tower.shapes])
        # First, since PEFT takes the first pattern that matches the end of a name, and those of the text model are short.
        for key, values in (
            ("rank_pattern", {name: shape.rank for name, shape in tower.shapes.items()}),
            ("alpha_pattern", {name: _number(shape.alpha) for name, shape in tower.shapes.items()}),
        ):
            changed[key] = values | settings[key]
    modules = {_module_of(piece) for piece in tower.saved}
    if modules:
        changed["modules_to_save"] = sorted({*(settings["modules_to_save"] or ()), *modules})
    return changed


def _module_of(piece: WeightPiece) -> str:
    """Return the whole name of the module on the wrapper that a weight belongs to."""
    return piece.name.removeprefix(_PREFIX).rpartition(".")[0]


def _number(x: float) -> int | float:
    """Return an integral alpha as int, as PEFT writes it."""
    return int(x) if x.is_integer() else x
