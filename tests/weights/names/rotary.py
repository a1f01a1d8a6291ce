"""Whether a layout has rotary pairs side by side."""

from __future__ import annotations

import math

import numpy as np

from moe_train.weights import names
from tests.weights.names.models import SMALL


def check_rotary_pairs(layout: names.TensorLayout, q: str, k: str) -> None:
    """Rows 2i and 2i + 1 of a head are there what rows i and i + H/2 are in Hugging Face's order; v is left alone.

    Args:
        layout: the layout.
        q: end of the names of query projections.
        k: end of the names of key projections.
    """
    ours = {(piece.path, piece.lead): piece for piece in names.weight_pieces(SMALL)}
    for piece in names.weight_pieces(SMALL, layout):
        if piece.part:
            continue  # of a stack: the experts have no rotary order
        matrix = np.arange(math.prod(piece.shape)).reshape(piece.shape)
        half_split = ours[piece.path, piece.lead].to_file(piece.from_file(matrix.__getitem__))
        if piece.name.endswith((q, k)):
            pairs = half_split.reshape(-1, 2, 3, 6).swapaxes(1, 2).reshape(matrix.shape)
            assert np.array_equal(pairs, matrix) and not np.array_equal(half_split, matrix)
            assert np.array_equal(half_split[[6, 7, 9]], matrix[[6, 8, 7]])
        else:
            assert np.array_equal(half_split, matrix)
