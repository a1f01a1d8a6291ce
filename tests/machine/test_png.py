"""Pictures that another library reads back as they were."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from moe_train.machine.png import load_colors, png_of


def test_pillow_reads_the_pixels_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with Image.open(io.BytesIO(png_of(pixels))) as image:
        image.verify()  # the checksums
    with Image.open(io.BytesIO(png_of(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_colors_of_loads() -> None:
    idle, even, busy, more, unknown = load_colors(np.array([0.0, 1.0, 2.0, 7.0, np.nan])).tolist()
    assert even == [247, 247, 247] and busy == more and unknown == [160, 160, 160]
    assert idle[2] > idle[0] and busy[0] > busy[2]
