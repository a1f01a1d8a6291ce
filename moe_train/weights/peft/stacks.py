"""How the adapters of a file, matrix by matrix, become stacks of adapters with one rank and one scale.

Files may have other ranks and alphas in some layers (`rank_pattern`, `alpha_pattern`), or none at all (`layers_to_transform`).
A stack has the largest rank of its layers and their most common scale. What a layer lacks is zeros in A and in B, whose product and
gradients are zero, so that training leaves them as they are; a different scale is multiplied into B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.weights import names
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft.pieces import ADAPTER_WEIGHTS
from moe_train.weights.peft.settings import alpha_of
from moe_train.weights.serve import AdapterShape


class Stacks(NamedTuple):
    """The adapters of a file as stacks."""

    targets: tuple[config.LoraTarget, ...]
    factors_of_b: Mapping[str, float]
    """Factor of B by its name, for matrices whose scale is not that of their stack."""
    padded: frozenset[str]
    """Modules, such as `attention.q_proj`, of which some matrices are padded with zeros."""


class _Matrix(NamedTuple):
    """A matrix that can have an adapter."""

    name_b: str
    """Name of its B."""
    expert: int | None
    """Index of the routed expert; None for other matrices."""
    shape: AdapterShape | None
    """Rank and alpha of its adapter; None without one."""


def stacks_of(
    directory: Path, settings: JsonObject, tensors: Mapping[str, FileTensor], pieces: Sequence[names.WeightPiece]
) -> Stacks:
    """Return the stacks of the adapters in a file.

    Args:
        directory: the adapter, for messages.
        settings: adapter_config.json.
        tensors: tensors by the names of a file with a matrix for each expert.
        pieces: A and B, in turn, of every weight that can have an adapter.

    Raises:
        ValueError: A or B of a matrix is missing, or there is no adapter at all.
    """
    matrices: dict[str, list[_Matrix]] = {}
    for piece_a, piece_b in zip(pieces[::2], pieces[1::2], strict=True):
        missing = [piece.name for piece in (piece_a, piece_b) if piece.name not in tensors]
        if len(missing) == 1:
            raise ValueError(f"{directory / ADAPTER_WEIGHTS} lacks {missing[0]}; save the adapter again")
        shape = None
        if not missing:
            if 0 in tensors[piece_a.name].shape:
                raise ValueError(f"{directory / ADAPTER_WEIGHTS}: {piece_a.name} has no numbers; save the adapter again")
            stem = piece_a.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            shape = AdapterShape(tensors[piece_a.name].shape[0], alpha_of(settings, stem))
        expert = piece_a.lead[1] if len(piece_a.lead) == 2 else None
        matrices.setdefault(ParameterPath.parse(piece_a.path).module, []).append(_Matrix(piece_b.name, expert, shape))
    adapted = {module: entries for module, entries in matrices.items() if any(entry.shape for entry in entries)}
    if not adapted:
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has no adapter under a name that PEFT reads; it has "
            f"{next(iter(tensors), 'no tensors')}: save it with save_pretrained of the PeftModel"
        )
    return _combine(adapted, bool(settings.get("use_rslora")))


def _combine(adapted: Mapping[str, list[_Matrix]], rslora: bool) -> Stacks:
    """Return one target for all modules with the same rank, alpha and experts, and what is padded and scaled for it."""
    modules_of: dict[tuple[AdapterShape, tuple[int, ...] | None], list[str]] = {}
    factors: dict[str, float] = {}
    padded: set[str] = set()
    for module, entries in adapted.items():
        experts_of = _experts_by_shape(entries)
        if experts_of is None:
            shape = _common_shape((entry.shape for entry in entries if entry.shape), rslora)
            experts_of = {shape: None}
            padded.add(module)
            for entry in entries:
                if entry.shape and _scale(entry.shape, rslora) != _scale(shape, rslora):
                    factors[entry.name_b] = _scale(entry.shape, rslora) / _scale(shape, rslora)
        elif any(experts is not None for experts in experts_of.values()):
            padded.add(module)
        for shape, experts in experts_of.items():
            modules_of.setdefault((shape, experts), []).append(module)
    targets: list[config.LoraTarget] = []
    for (shape, experts), modules in modules_of.items():
        targets.append(config.LoraTarget(modules=tuple(modules), rank=shape.rank, alpha=shape.alpha, experts=experts))
    return Stacks(tuple(targets), factors, frozenset(padded))


def _experts_by_shape(entries: Iterable[_Matrix]) -> dict[AdapterShape, tuple[int, ...] | None] | None:
    """Return the experts that have each shape, if every layer has the same; None otherwise.

    The experts are None where all matrices of the module have the shape, those of dense layers included.
    """
    shapes_of: dict[int | None, set[AdapterShape | None]] = {}
    for entry in entries:
        shapes_of.setdefault(entry.expert, set()).add(entry.shape)
    if any(len(shapes) > 1 for shapes in shapes_of.values()):
        return None  # layers differ
    shape_of = {expert: next(iter(shapes)) for expert, shapes in shapes_of.items()}
    shapes = set(shape_of.values())
    if len(shapes) == 1:
        return {shape: None for shape in shapes if shape is not None}
    if shape_of.get(None) is not None:
        return None  # targets that name experts skip dense layers
    by_shape: dict[AdapterShape, list[int]] = {}
    for expert, shape in shape_of.items():
        if shape is not None and expert is not None:
            by_shape.setdefault(shape, []).append(expert)
    return {shape: tuple(sorted(experts)) for shape, experts in by_shape.items()}


def _common_shape(shapes: Iterable[AdapterShape], rslora: bool) -> AdapterShape:
    """Return the largest rank of some shapes, and the alpha that gives their most common scale at it."""
    stated = Counter(shapes)
    rank = max(shape.rank for shape in stated)
    scales: Counter[float] = Counter()
    for shape, count in stated.items():
        scales[_scale(shape, rslora)] += count
    ((scale, _),) = scales.most_common(1)
    # The alpha of the file where possible, since scale * rank can differ from it by a rounding.
    for shape in stated:
        if shape.rank == rank and _scale(shape, rslora) == scale:
            return shape
    return AdapterShape(rank, scale * _divisor(rank, rslora))


def _scale(shape: AdapterShape, rslora: bool) -> float:
    """Return the factor of B·A."""
    return shape.alpha / _divisor(shape.rank, rslora)


def _divisor(rank: int, rslora: bool) -> float:
    # arXiv:2312.03732
    return rank**0.5 if rslora else rank
