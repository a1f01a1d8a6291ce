"""Pictures and sound of prompts as arrays."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.evaluate.generation.batch import Request
from moe_train.evaluate.generation.media import arranged_media
from tests.data.batches.test_media_batch import pictures, sound


@pytest.mark.parametrize(("devices", "room"), [(1, 4), (3, 6)])
def test_patches_and_tokens_of_each_row(devices: int, room: int) -> None:
    requests = {
        0: Request(0, 0, [1, 10, 13, 7, 10, 10, 13], pictures(1, 2)),
        2: Request(1, 1, [10, 13], pictures(1, first=4)),
    }
    arranged = arranged_media(requests, (3, 8), devices)
    assert arranged.feature_index.tolist() == [[-1, 0, -1, -1, 1, 2, -1, -1], [-1] * 8, [0] + [-1] * 7]
    assert arranged.media.units.shape == (3, 4 * room, 12)
    padding = [0] * (4 * room - 12)
    assert arranged.media.ids[0].tolist() == [1] * 4 + [2] * 8 + padding
    assert arranged.media.places[0, :, 0].tolist() == [3] * 4 + [4] * 8 + padding
    assert not arranged.media.ids[1].any() and arranged.media.units[2, 3, 0] == 4


def test_chunks_and_tokens_of_each_row() -> None:
    draw = np.random.default_rng(0)
    long, short = sound(draw, 3), sound(draw, 1)
    requests = {0: Request(0, 0, [1, 25, *[24] * 12, 9], long), 2: Request(1, 1, [25, *[24] * 4], short)}
    heard = arranged_media(requests, (3, 16), devices=2)
    assert heard.media.units.shape == (3, 4, 32, 8) and heard.media.ids.tolist() == [[1, 2, 3, 0], [0] * 4, [1, 0, 0, 0]]
    assert heard.feature_index[0, 2:14].tolist() == list(range(12)) and heard.feature_index[2, 1:5].tolist() == list(range(4))
    assert (heard.feature_index >= 0).sum() == 16 and (heard.feature_index[1] == -1).all()
    assert np.array_equal(heard.media.units[0, :3], long.units) and np.array_equal(heard.media.units[2, :1], short.units)
