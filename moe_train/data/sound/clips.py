"""The sound of an example as spectrograms, in the form in which a batch takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_train.data.sound.log_mel import log_mel
from moe_train.data.sound.read import samples_of
from moe_train.data.sound.rules import SoundRules


class SoundOfPiece(NamedTuple):
    """The sound of an example, in the order of its tokens."""

    chunks: np.ndarray
    """(chunks, frames, bands) float32: the spectrograms of all clips, chunk by chunk."""
    audio_token: int
    """Id of the token that stands for a part of a chunk."""


def sound_of_piece(files: Sequence[bytes], rules: SoundRules) -> SoundOfPiece | None:
    """Return the spectrograms of clips that have been checked, in the order of their tokens; None if there are none."""
    if not files:
        return None
    spectrograms = [log_mel(samples_of(data, rules.sampling_rate), rules) for data in files]
    return SoundOfPiece(np.concatenate(spectrograms), rules.audio_token)
