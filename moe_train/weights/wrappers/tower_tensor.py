"""One row of a tower's table: a tensor with its names in both layouts."""

from __future__ import annotations

from typing import NamedTuple


class TowerTensor(NamedTuple):
    """A tensor of a tower or a projector."""

    name: str
    """Name in the files of Hugging Face's layout."""
    shape: tuple[int, ...]
    native: str | None = None
    """Name in Mistral's own layout; None if the layout has no such tensor."""
    heads: int = 0
    """Number of heads if the rows of each are in another rotary order in Mistral's own layout; 0 if they are the same."""
