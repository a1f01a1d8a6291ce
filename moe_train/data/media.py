"""Pictures and sound of an example: what a batch takes of the files that its tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.data.pictures.patches import PicturesOfPiece, pictures_of_piece
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.clips import SoundOfPiece, sound_of_piece
from moe_train.data.sound.rules import SoundRules

MediaRules = PictureRules | SoundRules
"""How pictures, or sound, become tokens."""
MediaOfPiece = PicturesOfPiece | SoundOfPiece
"""The pictures or the sound of an example."""


def media_of_piece(files: Sequence[bytes], rules: MediaRules | None) -> MediaOfPiece | None:
    """Return the pictures or the sound of files that have been checked, in the order of their tokens.

    Args:
        files: content of the files.
        rules: how they became tokens; None if the tokenizer has only text.

    Returns:
        None if there are no files.
    """
    if rules is None:
        assert not files, "files whose tokens nothing stands for"
        return None
    return pictures_of_piece(files, rules) if isinstance(rules, PictureRules) else sound_of_piece(files, rules)
