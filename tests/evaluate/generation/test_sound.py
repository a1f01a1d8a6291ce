"""The sound of prompts in the rows of a batch."""

from __future__ import annotations

import numpy as np

from moe_train.data.sound.clips import SoundOfPiece
from moe_train.evaluate.generation.sound import heard_sound


def test_rows_with_and_without_sound() -> None:
    draw = np.random.default_rng(0)
    long, short = (SoundOfPiece(draw.normal(size=(count, 32, 8)).astype(np.float32), 24) for count in (3, 1))
    prompts = {0: ([1, 25, *[24] * 12, 9], long), 2: ([25, *[24] * 4], short)}
    heard = heard_sound(prompts, (3, 16), devices=2)
    assert heard.sound.frames.shape == (3, 4, 32, 8) and heard.sound.chunk_ids.tolist() == [[1, 2, 3, 0], [0] * 4, [1, 0, 0, 0]]
    assert heard.feature_index[0, 2:14].tolist() == list(range(12)) and heard.feature_index[2, 1:5].tolist() == list(range(4))
    assert (heard.feature_index >= 0).sum() == 16 and (heard.feature_index[1] == -1).all()
    assert np.array_equal(heard.sound.frames[0, :3], long.chunks) and np.array_equal(heard.sound.frames[2, :1], short.chunks)
