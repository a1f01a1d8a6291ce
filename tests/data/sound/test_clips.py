"""The sound of an example, chunk by chunk in the order of its clips."""

from __future__ import annotations

import numpy as np

from moe_train.data.sound.clips import sound_of_piece
from moe_train.data.sound.log_mel import log_mel
from tests.commands.audio_wrapper import tone, wav
from tests.data.sound.test_log_mel import SMALL


def test_chunks_of_several_clips() -> None:
    clips = [tone(300, 0.4), tone(600, 0.1)]
    sound = sound_of_piece([wav(clip) for clip in clips], SMALL)
    assert sound is not None and sound.audio_token == 24
    expected = [log_mel(clip / np.float32(32768), SMALL) for clip in clips]
    assert [len(x) for x in expected] == [2, 1] and np.array_equal(sound.chunks, np.concatenate(expected))
    assert sound_of_piece([], SMALL) is None
