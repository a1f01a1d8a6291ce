"""A picture as normalized patches, in the order in which a vision tower takes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_train.data.pictures.resize import resize_bicubic
from moe_train.data.pictures.rules import PictureRules

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""Mean and standard deviation of red, green and blue in [0, 1], by which mistral-common normalizes (those of CLIP)."""


class PatchedPicture(NamedTuple):
    """The patches of one picture. Those that merge to one token are neighbours, in the order of rows and columns."""

    patches: np.ndarray
    """(n, 3 * patch_size**2) float32: channel, row, column."""
    places: np.ndarray
    """(n, 2) int32: row and column of each patch in the picture."""


def normalized(rgb: np.ndarray, rules: PictureRules) -> np.ndarray:
    """Resize and normalize a picture.

    Args:
        rgb: (H, W, 3) uint8.
        rules: sizes.

    Returns:
        (3, height, width) float32, of whole tokens.
    """
    grid = rules.grid(rgb.shape[1], rgb.shape[0])
    side = rules.token_pixels
    pixels = resize_bicubic(rgb.astype(np.float32), grid.width * side, grid.height * side)
    pixels /= np.float32(255)
    pixels -= MEAN
    pixels /= STD
    return pixels.transpose(2, 0, 1)


def patched(pixels: np.ndarray, rules: PictureRules) -> PatchedPicture:
    """Cut a normalized picture into patches.

    Args:
        pixels: (3, height, width), of whole tokens.
        rules: sizes.
    """
    P = rules.patch_size
    S = rules.cell_size
    height = pixels.shape[1] // (P * S)
    width = pixels.shape[2] // (P * S)
    # channel, token row, patch row in it, pixel row, and the same for columns -> tokens, patches in them, pixels.
    by_side = pixels.reshape(3, height, S, P, width, S, P).transpose(1, 4, 2, 5, 0, 3, 6)
    patches = by_side.reshape(height * width * S * S, 3 * P * P)
    rows, columns = np.meshgrid(np.arange(height * S), np.arange(width * S), indexing="ij")
    places = np.stack([rows, columns], axis=-1).reshape(height, S, width, S, 2).transpose(0, 2, 1, 3, 4)
    return PatchedPicture(np.ascontiguousarray(patches), np.ascontiguousarray(places.reshape(-1, 2), np.int32))
