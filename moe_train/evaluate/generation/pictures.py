"""The pictures of prompts as arrays for a batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from moe_train.data.media import MediaOfPiece
from moe_train.data.pictures.patches import PicturesOfPiece


class PromptWithPictures(Protocol):
    """A prompt, and the pictures that its tokens stand for."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def pictures(self) -> MediaOfPiece | None: ...


class PatchArrays(NamedTuple):
    """The fields of `model.encoders.pictures.Pictures` as NumPy arrays."""

    patches: np.ndarray
    places: np.ndarray
    picture_ids: np.ndarray
    feature_index: np.ndarray


class PromptPictures(NamedTuple):
    """Patches of the pictures of the rows of a batch, and the tokens of the prompts that they become."""

    pictures: PatchArrays
    feature_index: np.ndarray
    """(B, T) index of the feature of each token; -1 for others."""


def shown_pictures(requests: Mapping[int, PromptWithPictures], shape: tuple[int, ...], devices: int) -> PromptPictures:
    """Arrange the pictures of prompts.

    Args:
        requests: prompts with pictures by row.
        shape: rows and columns of the prompts.
        devices: number of devices along `context`, which split patches and features.

    Returns:
        Room for a power of two of tokens, so that few programs are compiled.
    """
    index = np.full(shape, -1, np.int32)
    patches_per_token = 0
    most_tokens = 0
    values = 0
    for row, request in requests.items():
        assert isinstance(request.pictures, PicturesOfPiece)
        positions = np.flatnonzero(np.array(request.prompt) == request.pictures.image_token)
        index[row, positions] = np.arange(len(positions))
        num_patches = sum(len(picture.patches) for picture in request.pictures.pictures)
        assert len(positions) and num_patches % len(positions) == 0, "pictures and their tokens differ in number"
        patches_per_token = num_patches // len(positions)
        most_tokens = max(most_tokens, len(positions))
        values = request.pictures.pictures[0].patches.shape[1]
    room = 2 ** math.ceil(math.log2(most_tokens))
    room += -room % devices
    P = room * patches_per_token
    arrays = PatchArrays(
        np.zeros((shape[0], P, values), np.float32),
        np.zeros((shape[0], P, 2), np.int32),
        np.zeros((shape[0], P), np.int32),
        np.full((shape[0], room), -1, np.int32),
    )
    for row, request in requests.items():
        assert isinstance(request.pictures, PicturesOfPiece)
        start = 0
        for number, picture in enumerate(request.pictures.pictures, start=1):
            end = start + len(picture.patches)
            arrays.patches[row, start:end] = picture.patches
            arrays.places[row, start:end] = picture.places
            arrays.picture_ids[row, start:end] = number
            start = end
    return PromptPictures(arrays, index)
