"""Bicubic resizing of pictures as OpenCV computes it (INTER_CUBIC on float32), with which mistral-common resizes.

Each output pixel is a weighted sum of 4 x 4 input pixels around its centre, with the cubic kernel of a = -0.75. Nothing is
averaged when a picture shrinks, and pixels beyond the border repeat the outermost ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_A = -0.75
"""Parameter of the kernel (Keys 1981)."""


class _Taps(NamedTuple):
    """The input pixels of each output pixel along one side, and their weights."""

    indices: np.ndarray
    """(4, n) int."""
    weights: np.ndarray
    """(4, n) float32."""


def resize_bicubic(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a picture.

    Args:
        pixels: (H, W, channels) float32.
        width: width of the result in pixels.
        height: height of the result in pixels.

    Returns:
        (height, width, channels) float32; values may lie outside the range of the input's.
    """
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    across = _taps(pixels.shape[1], width)
    rows = _weighted_sum(pixels, across, axis=1)
    return _weighted_sum(rows, _taps(pixels.shape[0], height), axis=0)


def _taps(size: int, new_size: int) -> _Taps:
    """Return the taps of each output pixel along a side of `size` pixels."""
    # The position of an output pixel's centre among the input's pixels.
    centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    first = np.floor(centre).astype(np.int64)
    x = centre - first
    before = ((_A * (x + 1) - 5 * _A) * (x + 1) + 8 * _A) * (x + 1) - 4 * _A
    left = ((_A + 2) * x - (_A + 3)) * x * x + 1
    right = ((_A + 2) * (1 - x) - (_A + 3)) * (1 - x) * (1 - x) + 1
    weights = np.stack([before, left, right, 1 - before - left - right]).astype(np.float32)
    indices = np.clip(first + np.arange(-1, 3)[:, None], 0, size - 1)
    return _Taps(indices, weights)


def _weighted_sum(pixels: np.ndarray, taps: _Taps, axis: int) -> np.ndarray:
    """Return the weighted sums of the taps along an axis, 0 or 1."""
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: np.ndarray | None = None
    for indices, weights in zip(*taps, strict=True):
        term = np.take(pixels, indices, axis=axis) * weights.reshape(shape)
        total = term if total is None else total + term
    assert total is not None
    return total
