"""Files of an example as what a batch takes, by the tokenizer's rules."""

from __future__ import annotations

import io

from PIL import Image

from moe_train.data.media import media_of_piece
from moe_train.data.pictures.patches import PicturesOfPiece
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.clips import SoundOfPiece
from tests.commands.audio_wrapper import tone, wav
from tests.data.sound.test_log_mel import SMALL


def test_the_rules_say_what_the_files_are() -> None:
    assert media_of_piece((), None) is None and media_of_piece((), SMALL) is None
    assert isinstance(media_of_piece([wav(tone(300, 0.1))], SMALL), SoundOfPiece)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    assert isinstance(media_of_piece([file.getvalue()], PictureRules(2, 2, 8, 10, 12, 13)), PicturesOfPiece)
