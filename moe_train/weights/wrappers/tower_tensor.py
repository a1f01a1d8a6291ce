"""Rows of the tables of a tower: a tensor with its names in both layouts, and with its place in our arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_train.weights.names.tensor_layout import Row


class TowerTensor(NamedTuple):
    """A tensor of a tower or a projector."""

    name: str
    """Name in the files of Hugging Face's layout."""
    shape: tuple[int, ...]
    native: str | None = None
    """Name in Mistral's own layout; None if the layout has no such tensor."""
    heads: int = 0
    """Number of heads if the rows of each are in another rotary order in Mistral's own layout; 0 if they are the same."""


class TowerRows(NamedTuple):
    """Every tensor of a tower and its projector in Hugging Face's layout, with its place in our arrays."""

    rows: Sequence[tuple[Row, tuple[int, ...]]]
    """Each tensor, and its entry in the stacked dim of layers; () outside the layers."""
    sizes: Mapping[str, int]
    """Sizes of dims by letter."""
