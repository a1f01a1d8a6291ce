"""Normalized pixels, and the order of patches."""

from __future__ import annotations

import numpy as np
from mistral_common.tokens.tokenizers.image import DATASET_MEAN, DATASET_STD, normalize

from moe_train.data.pictures.patches import normalized, patched
from moe_train.data.pictures.resize import resize_bicubic
from moe_train.data.pictures.rules import PictureRules

RULES = PictureRules(2, 3, 100, 10, 12, 13)


def test_pixels_are_normalized_as_in_mistral_common() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (11, 20, 3), np.uint8)
    resized = resize_bicubic(rgb.astype(np.float32), 24, 12)
    assert np.array_equal(normalized(rgb, RULES), normalize(resized, DATASET_MEAN, DATASET_STD))


def test_patches_that_merge_are_neighbours() -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 12, 18)).astype(np.float32)
    picture = patched(pixels, RULES)
    assert picture.patches.shape == (54, 12)
    cells = picture.places.reshape(6, 9, 2) // 3
    assert (cells == cells[:, :1]).all()
    # Tokens go row by row, and so do the patches of each.
    assert cells[:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert (picture.places[:9] % 3).tolist() == [[dy, dx] for dy in range(3) for dx in range(3)]
    for patch, (row, column) in zip(picture.patches, picture.places, strict=True):
        assert np.array_equal(patch.reshape(3, 2, 2), pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2])
