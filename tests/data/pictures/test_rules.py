"""Tokens and patches of pictures against mistral-common's encoder."""

from __future__ import annotations

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image

from moe_train.data.pictures.rules import PictureRules

RULES = PictureRules(14, 2, 1540, 10, 12, 13)


@pytest.mark.parametrize("rules", [RULES, PictureRules(16, 1, 1024, 10, 12, 13)])
def test_grids_equal_those_of_mistral_common(rules: PictureRules) -> None:
    sizes = ImageConfig(rules.patch_size, rules.max_image_size, rules.cell_size)
    encoder = ImageEncoder(sizes, SpecialImageIDs(10, 12, 13))
    draw = np.random.default_rng(0)
    shapes = [(1, 1), (1, 9000), (100, 60), (1540, 1540), (3000, 1000), (4145, 3846), *draw.integers(1, 5000, (60, 2)).tolist()]
    for width, height in shapes:
        assert tuple(rules.grid(width, height)) == encoder._image_to_num_tokens(Image.new("1", (width, height))), (width, height)


def test_tokens_of_a_grid() -> None:
    assert RULES.tokens(RULES.grid(50, 40)) == [10, 10, 12, 10, 10, 13]
    assert RULES.num_patches(RULES.grid(50, 40)) == 16
    assert RULES.control_ids == (10, 12, 13)
