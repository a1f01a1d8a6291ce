"""Pictures and sound of an example: what a batch takes of the files that its tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_train.data.pictures.patches import normalized, patched
from moe_train.data.pictures.read import open_picture, rgb_of
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.log_mel import log_mel
from moe_train.data.sound.read import open_clip, samples_of
from moe_train.data.sound.rules import SoundRules

MediaRules = PictureRules | SoundRules
"""How pictures, or sound, become tokens."""


class MediaOfPiece(NamedTuple):
    """The pictures or the sound of an example, in the order of its tokens: n units, which are patches or chunks."""

    units: np.ndarray
    """(n, …) float32: the pixels of each patch, or (n, frames, bands), the spectrogram of each chunk."""
    places: np.ndarray
    """(n, 2) int32: row and column of each patch in its picture; zeros for chunks."""
    ids: np.ndarray
    """(n,) int32, ascending from 1: units with the same id attend to one another, as the patches of a picture; each chunk has an id
    of its own.
    """
    token: int
    """Id of the token that stands for a feature."""


def media_of_piece(files: Sequence[bytes], rules: MediaRules | None) -> MediaOfPiece | None:
    """Return the pictures or the sound of files that have been checked, in the order of their tokens.

    Args:
        files: content of the files.
        rules: how they became tokens; None if the tokenizer has only text.

    Returns:
        None if there are no files.
    """
    if not files:
        return None
    assert rules is not None, "files whose tokens nothing stands for"
    if isinstance(rules, SoundRules):
        chunks = np.concatenate([log_mel(samples_of(data, rules.sampling_rate), rules) for data in files])
        ids = np.arange(1, len(chunks) + 1, dtype=np.int32)
        return MediaOfPiece(chunks, np.zeros((len(chunks), 2), np.int32), ids, rules.audio_token)
    pictures = [patched(normalized(rgb_of(data), rules), rules) for data in files]
    sizes = [len(picture.patches) for picture in pictures]
    return MediaOfPiece(
        np.concatenate([picture.patches for picture in pictures]),
        np.concatenate([picture.places for picture in pictures]),
        np.repeat(np.arange(1, len(pictures) + 1, dtype=np.int32), sizes),
        rules.image_token,
    )


def check_file(reference: str, rules: MediaRules) -> None:
    """Read a picture or a clip of sound, by the kind of the rules.

    Args:
        reference: a data URL, or the path of a file.
        rules: how it would become tokens.

    Raises:
        Problem: it cannot be used.
    """
    if isinstance(rules, SoundRules):
        open_clip(reference, rules.sampling_rate)
    else:
        open_picture(reference)
