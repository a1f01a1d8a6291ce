"""Quantize matrices to FP8: a scale is the largest magnitude of its block over 448, the largest number of e4m3, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_train.weights import strided
from moe_train.weights.fp8.tensor import CHUNK_NUMBERS, E4M3

MAX_E4M3 = 448.0
"""Largest number of the format."""
_SMALLEST_SCALE = np.float32(2.0**-126)
"""Smallest normal float32: a smaller scale would have fewer bits."""


def quantize_matrix(name: str, w: np.ndarray, block: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix.

    Args:
        name: name of the tensor, for messages.
        w: the matrix in float32, (outputs, inputs).
        block: outputs and inputs that share a scale, the last ones fewer; None for one scale for all.

    Returns:
        The quantized values and their scales: a scalar, or a grid.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    if block is None:
        scale = _scale(name, _largest(w))
        return _quantize_with(w, scale), scale
    codes = np.empty(w.shape, E4M3)
    scales = np.empty([math.ceil(size / step) for size, step in zip(w.shape, block, strict=True)], np.float32)
    for rows in _row_chunks(w, block[0]):
        part = strided.contiguous(w[rows])
        row_starts = np.arange(0, part.shape[0], block[0])
        column_starts = np.arange(0, part.shape[1], block[1])
        largest_of_blocks = np.maximum.reduceat(np.maximum.reduceat(np.abs(part), row_starts, 0), column_starts, 1)
        first = rows.start // block[0]
        part_scales = _scale(name, largest_of_blocks)
        scales[first : first + len(row_starts)] = part_scales
        of_rows = np.arange(part.shape[0]) // block[0]
        of_columns = np.arange(part.shape[1]) // block[1]
        codes[rows] = _codes(part, part_scales[of_rows][:, of_columns])
    return codes, scales


def quantize_expert(
    name: str, matrices: Sequence[np.ndarray], block: tuple[int, int] | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Quantize the matrices of an expert in a fused tensor: gate and up, or one.

    Args:
        name: name of the tensor, for messages.
        matrices: the matrices in float32, (outputs, inputs), in the order of the tensor.
        block: outputs and inputs that share a scale; None for one scale for all matrices.

    Returns:
        The quantized values of each matrix, and the scales: a grid, or the one scale for each matrix, (matrices, 1).

    Raises:
        ValueError: a number is infinite or NaN.
    """
    if block is None:
        scale = _scale(name, np.max([_largest(w) for w in matrices]))
        return [_quantize_with(w, scale) for w in matrices], np.full((len(matrices), 1), scale, np.float32)
    pairs = [quantize_matrix(name, w, block) for w in matrices]
    return [codes for codes, _ in pairs], np.concatenate([scales for _, scales in pairs])


def _largest(w: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of a matrix."""
    largest = np.zeros((), np.float32)
    for rows in _row_chunks(w, 1):
        np.maximum(largest, np.abs(w[rows]).max(initial=0), out=largest)
    return largest


def _quantize_with(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Quantize a matrix with one scale."""
    codes = np.empty(w.shape, E4M3)
    for rows in _row_chunks(w, 1):
        codes[rows] = _codes(strided.contiguous(w[rows]), scale)
    return codes


def _row_chunks(w: np.ndarray, multiple: int) -> list[slice]:
    """Divide the rows of a matrix into parts of about `CHUNK_NUMBERS`, each but the last a multiple of `multiple` rows."""
    step = max(1, CHUNK_NUMBERS // max(1, w.shape[1]) // multiple) * multiple
    return [slice(start, min(start + step, len(w))) for start in range(0, len(w), step)]


def _scale(name: str, largest: np.ndarray) -> np.ndarray:
    """Return the scales of blocks with these largest magnitudes; 1 for blocks of zeros."""
    if not np.all(np.isfinite(largest)):
        raise ValueError(f"{name} has infinite or NaN numbers, which FP8 cannot express; look at the run's loss for divergence")
    return np.where(largest > 0, np.maximum(largest / np.float32(MAX_E4M3), _SMALLEST_SCALE), np.float32(1))


def _codes(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round quotients to the nearest number of the format, ties to even."""
    # A quotient can exceed 448 by a rounding of its scale, and would become NaN.
    return np.clip(w / scales, -MAX_E4M3, MAX_E4M3).astype(E4M3)
