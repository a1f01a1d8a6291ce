"""Checks of a file's tensors against the pieces of an architecture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Protocol

from moe_train import config
from moe_train.weights.names.pieces import WeightPiece


class HasShape(Protocol):
    """Anything with a shape, such as a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dims."""
        ...


def check_counts(source: object, model: config.Model, tensors: Mapping[str, HasShape]) -> None:
    """Raise ValueError if a file states more layers or experts than its tensors can have.

    A table of all of them might otherwise exceed memory.

    Args:
        source: the file, for messages.
        model: the architecture that the file states.
        tensors: tensors by name in the file.
    """
    # A layer has tensors of its own, and E is a dim of its router, so a true count exceeds neither limit.
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    experts = model.ffn.num_experts if isinstance(model.ffn, config.MoeFfn) else 0
    counts = (
        (model.num_layers, "layers", len(tensors)),
        (experts, "experts", largest),
    )
    for count, kind, limit in counts:
        if count > limit:
            raise ValueError(
                f"{source} states {count:,} {kind}, but has {len(tensors):,} tensors with no dim above {largest:,}; "
                "correct its config"
            )


def check_file_tensors(
    source: object,
    table: Collection[WeightPiece],
    tensors: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ValueError unless a file has exactly the table's tensors, fills each parameter once, and shapes fit.

    Args:
        source: the file, for messages.
        table: the pieces of the architecture.
        tensors: shapes by name in the file.
        parameters: shapes by our path.
    """
    # The pieces of a stacked tensor share its name and shape.
    expected_shapes = {piece.name: piece.shape for piece in table}
    faults = []
    if missing := [name for name in expected_shapes if name not in tensors]:
        faults.append(f"lacks {_first_few(missing)}")
    if extra := [name for name in tensors if name not in expected_shapes]:
        faults.append(f"has {_first_few(extra)}, which this architecture does not have")
    wrong_shapes: list[str] = []
    for name, shape in expected_shapes.items():
        if name in tensors and tuple(tensors[name]) != shape:
            wrong_shapes.append(f"{name} of shape {tuple(tensors[name])} instead of {shape}")
    if wrong_shapes:
        faults.append(f"has {_first_few(wrong_shapes)}")
    if faults:
        raise ValueError(
            f"{source} does not hold the model that its config describes: it {'; it '.join(faults)}; correct the config, or "
            "download the folder again"
        )
    filled: dict[str, set[tuple[int, ...]]] = {}
    for piece in table:
        leads = filled.setdefault(piece.path, set())
        assert piece.lead not in leads, piece
        leads.add(piece.lead)
    if unfilled := sorted(set(parameters) - set(filled)):
        raise ValueError(f"{source} has no tensors for {_first_few(unfilled)}; load these from another file")
    for piece in table:
        if piece.path not in parameters:
            continue
        shape = tuple(parameters[piece.path])
        stacked = len(piece.lead)
        # No entry occurs twice (asserted above), so their number shows whether the stacked dims are filled.
        if shape[stacked:] != piece.internal_shape or math.prod(shape[:stacked]) != len(filled[piece.path]):
            provided = f"{len(filled[piece.path])} x {piece.internal_shape}"
            raise ValueError(f"{source}: {piece.name} provides {provided}, but {piece.path} has shape {shape}")


def _first_few(names: Collection[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    text = ", ".join(list(names)[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text
