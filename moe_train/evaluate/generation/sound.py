"""The sound of prompts as arrays for a batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_train.data.sound.clips import SoundOfPiece


class SoundArrays(NamedTuple):
    """The fields of `model.encoders.sound.Sound` as NumPy arrays."""

    frames: np.ndarray
    chunk_ids: np.ndarray
    feature_index: np.ndarray


class PromptSound(NamedTuple):
    """Spectrograms of the sound of the rows of a batch, and the tokens of the prompts that they become."""

    sound: SoundArrays
    feature_index: np.ndarray
    """(B, T) index of the feature of each token; -1 for others."""


def heard_sound(prompts: Mapping[int, tuple[list[int], SoundOfPiece]], shape: tuple[int, ...], devices: int) -> PromptSound:
    """Arrange the sound of prompts.

    Args:
        prompts: token ids and sound of the prompts with sound, by row.
        shape: rows and columns of the prompts.
        devices: number of devices along `context`, which split chunks and features.

    Returns:
        Room for a power of two of chunks, so that few programs are compiled.
    """
    index = np.full(shape, -1, np.int32)
    most_chunks = max(len(sound.chunks) for _, sound in prompts.values())
    room = 2 ** math.ceil(math.log2(most_chunks))
    room += -room % devices
    _, any_sound = next(iter(prompts.values()))
    arrays = SoundArrays(
        np.zeros((shape[0], room, *any_sound.chunks.shape[1:]), np.float32),
        np.zeros((shape[0], room), np.int32),
        np.full((shape[0], room), -1, np.int32),
    )
    for row, (tokens, sound) in prompts.items():
        positions = np.flatnonzero(np.array(tokens) == sound.audio_token)
        assert len(positions) % len(sound.chunks) == 0, "sound and its tokens differ in number"
        index[row, positions] = np.arange(len(positions))
        arrays.frames[row, : len(sound.chunks)] = sound.chunks
        arrays.chunk_ids[row, : len(sound.chunks)] = np.arange(len(sound.chunks)) + 1
    return PromptSound(arrays, index)
