"""The batch type of texts with pictures: packed sequences, with the patches of the pictures of each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train import config
from moe_train.data.batches.batch import Batch, RowPlace, StoredPiece, write_segment
from moe_train.data.pictures.patches import PicturesOfPiece
from moe_train.data.pictures.rules import PictureRules


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), as in `Batch`, and (B, P, …) for the P patches that a row has room for."""

    tokens: np.ndarray
    """Input tokens."""
    targets: np.ndarray
    """The token that follows in the same segment."""
    loss_mask: np.ndarray
    """Whether the target is trained on."""
    segment_ids: np.ndarray
    """0 on padding; segments are numbered 1, 2, … along a row."""
    positions: np.ndarray
    """Position in the segment."""
    feature_index: np.ndarray
    """For a token that stands for a part of a picture, the index of that part in the row; -1 for others (int32)."""
    patches: np.ndarray
    """(B, P, C) float32: normalized pixels. Patches that merge to one token are neighbours."""
    places: np.ndarray
    """(B, P, 2) int32: row and column of each patch in its picture."""
    picture_ids: np.ndarray
    """(B, P) int32: pictures of the row, numbered from 1; 0 for padding."""


class PictureBatch(_Arrays):
    """Packed texts with pictures; `picture_batch` makes the type for a tower and a number of patches."""

    encoder: ClassVar[config.VisionEncoder]
    """The tower that takes the patches."""
    patches_per_row: ClassVar[int]
    """Patches that a row has room for."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        P = cls.patches_per_row
        return cls(
            *Batch.empty(rows, seq_len),
            np.full((rows, seq_len), -1, np.int32),
            np.zeros((rows, P, cls.encoder.patch_values), np.float32),
            np.zeros((rows, P, 2), np.int32),
            np.zeros((rows, P), np.int32),
        )

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of random tokens, whose first ones stand for a picture of random pixels that fills the room."""
        batch = cls.empty(rows, seq_len)
        for array, random in zip(batch, Batch.synthetic(rows, seq_len, vocab_size, seed), strict=False):
            array[:] = random
        count = min(cls.patches_per_row // cls.encoder.patches_per_token, seq_len)
        batch.feature_index[:, :count] = np.arange(count)
        batch.loss_mask[:, : count - 1] = False
        batch.patches[:] = np.random.default_rng(seed).normal(size=batch.patches.shape)
        batch.picture_ids[:] = 1
        return batch

    @classmethod
    def check_rules(cls, rules: PictureRules, name: str) -> None:
        """Raise ValueError if pictures become tokens by other sizes than those of the tower.

        Args:
            rules: how the pictures of a set became tokens.
            name: the set, for the message.
        """
        encoder = cls.encoder
        expected = (encoder.patch_size, encoder.cell_size, encoder.max_image_size)
        if rules[:3] != expected:
            raise ValueError(
                f"{name}: its tokenizer has pictures of patch size, merged side and largest side {rules[:3]}, but the vision tower "
                f"of init_from has {expected}; use the tokenizer that belongs to the model"
            )

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write texts with their pictures one after the other into an empty row."""
        place = RowPlace()
        num_patches = 0
        num_pictures = 0
        for piece in pieces:
            start = place.position
            for segment in piece.segments():
                place = write_segment(self, row, place, segment)
            if piece.pictures is None:
                continue
            assert isinstance(piece.pictures, PicturesOfPiece)  # `check_set` has refused sound
            first_feature = num_patches // self.encoder.patches_per_token
            for picture in piece.pictures.pictures:
                end = num_patches + len(picture.patches)
                num_pictures += 1
                self.patches[row, num_patches:end] = picture.patches
                self.places[row, num_patches:end] = picture.places
                self.picture_ids[row, num_patches:end] = num_pictures
                num_patches = end
            # Pictures and their tokens are in the same order.
            positions = start + np.flatnonzero(self.tokens[row, start : place.position] == piece.pictures.image_token)
            features = np.arange(first_feature, num_patches // self.encoder.patches_per_token)
            assert len(positions) == len(features), "pictures and their tokens differ in number"
            self.feature_index[row, positions] = features


@functools.cache
def picture_batch(encoder: config.VisionEncoder, patches_per_row: int) -> type[PictureBatch]:
    """Return the batch type for the patches of a tower.

    Args:
        encoder: the tower.
        patches_per_row: patches that a row has room for.
    """
    sizes = {"encoder": encoder, "patches_per_row": patches_per_row, "__module__": __name__}
    return type("PictureBatch", (PictureBatch,), sizes)
