"""The pictures and the sound of prompts as arrays for a batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from moe_train.data.media import MediaOfPiece


class PromptWithMedia(Protocol):
    """A prompt, and the pictures or the sound that its tokens stand for."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def media(self) -> MediaOfPiece | None: ...


class MediaArrays(NamedTuple):
    """The fields of `model.encoders.media.Media` as NumPy arrays."""

    units: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    feature_index: np.ndarray


class PromptMedia(NamedTuple):
    """Patches or chunks of the rows of a batch, and the tokens of the prompts that they become."""

    media: MediaArrays
    feature_index: np.ndarray
    """(B, T) index of the feature of each token; -1 for others."""


def arranged_media(requests: Mapping[int, PromptWithMedia], shape: tuple[int, ...], devices: int) -> PromptMedia:
    """Arrange the pictures or the sound of prompts.

    Args:
        requests: prompts with pictures or sound, all of one kind, by row.
        shape: rows and columns of the prompts.
        devices: number of devices along `context`, which split units and features.

    Returns:
        Room for a power of two of tokens of pictures, or of chunks, so that few programs are compiled.
    """
    index = np.full(shape, -1, np.int32)
    most_units = 0
    units_per_token = 1
    unit_shape: tuple[int, ...] = ()
    for row, request in requests.items():
        media = request.media
        assert media is not None
        positions = np.flatnonzero(np.array(request.prompt) == media.token)
        index[row, positions] = np.arange(len(positions))
        # A token stands for several patches, and several tokens for a chunk.
        assert len(positions), "pictures or sound and their tokens differ in number"
        assert 0 in (len(media.units) % len(positions), len(positions) % len(media.units)), "parts of a token or of a chunk"
        units_per_token = max(1, len(media.units) // len(positions))
        most_units = max(most_units, len(media.units))
        unit_shape = media.units.shape[1:]
    groups = 2 ** math.ceil(math.log2(most_units // units_per_token))
    groups += -groups % devices
    N = groups * units_per_token
    arrays = MediaArrays(
        np.zeros((shape[0], N, *unit_shape), np.float32),
        np.zeros((shape[0], N, 2), np.int32),
        np.zeros((shape[0], N), np.int32),
        np.full((shape[0], devices), -1, np.int32),  # no tokens: only the features are computed
    )
    for row, request in requests.items():
        media = request.media
        assert media is not None
        end = len(media.units)
        arrays.units[row, :end] = media.units
        arrays.places[row, :end] = media.places
        arrays.ids[row, :end] = media.ids
    return PromptMedia(arrays, index)
