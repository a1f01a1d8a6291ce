"""Bicubic resizing against its definition, and against OpenCV where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.pictures.resize import resize_bicubic


def by_definition(row: np.ndarray, size: int) -> np.ndarray:
    """A row of numbers resized with the cubic kernel of a = -0.75, pixel by pixel."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    result = np.zeros(size)
    for i in range(size):
        centre = (i + 0.5) * len(row) / size - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            result[i] += kernel(centre - j) * row[min(max(j, 0), len(row) - 1)]
    return result


@pytest.mark.parametrize(("size", "new_size"), [(7, 12), (12, 5), (1, 4), (2, 3), (100, 28)])
def test_both_sides_follow_the_definition(size: int, new_size: int) -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (size, size, 3)).astype(np.float32)
    across = np.stack([[by_definition(row[:, c], new_size) for row in pixels] for c in range(3)], axis=-1)
    expected = np.stack([[by_definition(column[:, c], new_size) for column in across.swapaxes(0, 1)] for c in range(3)], axis=-1)
    found = resize_bicubic(pixels, new_size, new_size)
    assert found.dtype == np.float32
    assert np.abs(found - expected.swapaxes(0, 1)).max() < 2e-4


def test_a_picture_of_its_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (5, 9, 3)).astype(np.float32)
    assert np.array_equal(resize_bicubic(pixels, 9, 5), pixels)


@pytest.mark.judges
@pytest.mark.parametrize(
    ("shape", "bound"),
    [((60, 100, 84, 112), 1e-6), ((300, 100, 154, 56), 1e-6), ((369, 41, 28, 322), 1e-6), ((1, 90, 28, 308), 2e-5)],
)
def test_pixels_equal_those_of_opencv(shape: tuple[int, int, int, int], bound: float) -> None:
    """OpenCV adds the four terms in another order, and computes pictures of a few rows with rounded positions."""
    cv2 = pytest.importorskip("cv2")
    height, width, new_height, new_width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.float32)
    theirs = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_CUBIC)
    assert np.abs(resize_bicubic(pixels, new_width, new_height) - theirs).max() < 255 * bound
