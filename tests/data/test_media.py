"""Files of an example as what a batch takes, by the tokenizer's rules."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_train.data.media import check_file, media_of_piece
from moe_train.data.pictures.patches import normalized, patched
from moe_train.data.pictures.read import rgb_of
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.records.problem import Problem
from moe_train.data.sound.log_mel import log_mel
from tests.commands.audio_wrapper import tone, wav
from tests.data.sound.test_log_mel import SMALL

RULES = PictureRules(2, 2, 8, 10, 12, 13)


def test_chunks_of_several_clips() -> None:
    clips = [tone(300, 0.4), tone(600, 0.1)]
    sound = media_of_piece([wav(clip) for clip in clips], SMALL)
    assert sound is not None and sound.token == 24 and sound.ids.tolist() == [1, 2, 3] and not sound.places.any()
    expected = [log_mel(clip / np.float32(32768), SMALL) for clip in clips]
    assert [len(x) for x in expected] == [2, 1] and np.array_equal(sound.units, np.concatenate(expected))
    assert media_of_piece([], SMALL) is None and media_of_piece((), None) is None


def test_patches_of_several_pictures() -> None:
    files = []
    for size in ((4, 4), (8, 4)):
        file = io.BytesIO()
        Image.new("RGB", size, (size[0], 2, 3)).save(file, "PNG")
        files.append(file.getvalue())
    seen = media_of_piece(files, RULES)
    expected = [patched(normalized(rgb_of(data), RULES), RULES) for data in files]
    assert seen is not None and seen.token == 10 and seen.ids.tolist() == [1] * 4 + [2] * 8
    assert np.array_equal(seen.units, np.concatenate([picture.patches for picture in expected]))
    assert np.array_equal(seen.places, np.concatenate([picture.places for picture in expected]))


def test_files_are_checked_by_what_the_model_takes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone(300, 0.1)))
    check_file(str(tmp_path / "a.wav"), SMALL)
    with pytest.raises(Problem, match="is no picture"):
        check_file(str(tmp_path / "a.wav"), RULES)
