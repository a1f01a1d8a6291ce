"""The batch type of texts whose pictures or sound are stored as features: packed sequences, and the features of each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import ml_dtypes
import numpy as np

from moe_train import config
from moe_train.data.batches.batch import Batch, RowPlace, StoredPiece, write_segment
from moe_train.data.batches.media_batch import MediaBatch, media_batch

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), as in `Batch`, and (B, M, E) for the M features that a row has room for."""

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
    """For a token that stands for a feature, the index of that in the row; -1 for others (int32)."""
    features: np.ndarray
    """(B, M, E): features in the dtype of the computation."""


class FeatureShape(NamedTuple):
    """The features that a row has room for."""

    width: int
    """Width of the text model."""
    dtype: str
    """float32 or bfloat16."""


class FeatureBatch(_Arrays):
    """Packed texts with features; `feature_batch` makes the type for a tower and a shape."""

    encoder: ClassVar[config.Encoder]
    """The tower that computed the features."""
    units_per_row: ClassVar[int]
    """Patches or chunks that a row has room for, by which rows are packed as where the tower runs in every step."""
    shape: ClassVar[FeatureShape]
    rooms: ClassVar[tuple[int, ...]]
    """As in `MediaBatch`."""

    @classmethod
    def with_room(cls, units: int) -> type[FeatureBatch]:
        """Return the type for the smallest of the rooms that the features of `units` patches or chunks fit into."""
        return feature_batch(cls.encoder, next(room for room in cls.rooms if room >= units), cls.shape, cls.rooms)

    @classmethod
    def computed_type(cls) -> type[MediaBatch]:
        """Return the type of the batches whose features the tower computes in every step."""
        return media_batch(cls.encoder, cls.units_per_row)

    @classmethod
    def num_features(cls) -> int:
        """Return the number of features that a row has room for."""
        return cls.encoder.num_features(cls.units_per_row)

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        index = np.full((rows, seq_len), -1, np.int32)
        features = np.zeros((rows, cls.num_features(), cls.shape.width), _DTYPES[cls.shape.dtype])
        return cls(*Batch.empty(rows, seq_len), index, features)

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of random tokens, whose first ones stand for random features that fill the room."""
        batch = cls.empty(rows, seq_len)
        for array, random in zip(batch, Batch.synthetic(rows, seq_len, vocab_size, seed), strict=False):
            array[:] = random
        count = min(cls.num_features(), seq_len)
        batch.feature_index[:, :count] = np.arange(count)
        batch.loss_mask[:, : count - 1] = False
        batch.features[:] = np.random.default_rng(seed).normal(size=batch.features.shape)
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write texts with their features one after the other into an empty row."""
        place = RowPlace()
        count = 0
        for piece in pieces:
            start = place.position
            for segment in piece.segments():
                place = write_segment(self, row, place, segment)
            if piece.features is None:
                continue
            end = count + len(piece.features.features)
            self.features[row, count:end] = piece.features.features
            # Features and their tokens are in the same order.
            positions = start + np.flatnonzero(self.tokens[row, start : place.position] == piece.features.token)
            assert len(positions) == end - count, "features and their tokens differ in number"
            self.feature_index[row, positions] = np.arange(count, end)
            count = end


@functools.cache
def feature_batch(
    encoder: config.Encoder, units_per_row: int, shape: FeatureShape, rooms: tuple[int, ...] = ()
) -> type[FeatureBatch]:
    """Return the batch type for the features of a tower.

    Args:
        encoder: the tower.
        units_per_row: patches of pictures, or chunks of sound, that a row has room for.
        shape: width and dtype of the features.
        rooms: as in `media_batch`.
    """
    attributes = {"encoder": encoder, "units_per_row": units_per_row, "shape": shape, "rooms": rooms or (units_per_row,)}
    return type("FeatureBatch", (FeatureBatch,), {**attributes, "__module__": __name__})
