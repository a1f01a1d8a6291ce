"""Pictures of prompts as arrays."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.pictures.patches import PatchedPicture, PicturesOfPiece
from moe_train.evaluate.generation.batch import Request
from moe_train.evaluate.generation.pictures import shown_pictures


def picture(tokens: int, value: int) -> PatchedPicture:
    return PatchedPicture(np.full((4 * tokens, 12), value, np.float32), np.full((4 * tokens, 2), value, np.int32))


@pytest.mark.parametrize(("devices", "room"), [(1, 4), (3, 6)])
def test_patches_and_tokens_of_each_row(devices: int, room: int) -> None:
    requests = {
        0: Request(0, 0, [1, 10, 13, 7, 10, 10, 13], PicturesOfPiece((picture(1, 2), picture(2, 3)), 10)),
        2: Request(1, 1, [10, 13], PicturesOfPiece((picture(1, 4),), 10)),
    }
    shown = shown_pictures(requests, (3, 8), devices)
    assert shown.feature_index.tolist() == [[-1, 0, -1, -1, 1, 2, -1, -1], [-1] * 8, [0] + [-1] * 7]
    assert shown.pictures.feature_index.shape == (3, room) and shown.pictures.patches.shape == (3, 4 * room, 12)
    padding = [0] * (4 * room - 12)
    assert shown.pictures.picture_ids[0].tolist() == [1] * 4 + [2] * 8 + padding
    assert shown.pictures.places[0, :, 0].tolist() == [2] * 4 + [3] * 8 + padding
    assert not shown.pictures.picture_ids[1].any() and shown.pictures.patches[2, 3, 0] == 4
