"""The batch type of classification: packed texts, with the labels of each at its last token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train import config
from moe_train.data.batches.batch import StoredPiece


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), or (B, T, Y) for the labels."""

    tokens: np.ndarray
    """Input tokens (int32); unlike in `Batch`, the last token of a segment is an input too."""
    segment_ids: np.ndarray
    """0 on padding; segments are numbered 1, 2, … along a row."""
    positions: np.ndarray
    """Position in the segment."""
    is_last: np.ndarray
    """Whether a position is the last of its segment, where the head reads its scores."""
    labels: np.ndarray
    """(B, T, Y) float32: at a last position 1 for each label that the text has, and 0 for others, -1 if that is not known."""


class ClassificationBatch(_Arrays):
    """Packed texts with labels; `classification_batch` makes the type for some targets."""

    reads_last_token: ClassVar[bool] = True
    """The last token of a segment takes a position, too."""
    targets: ClassVar[tuple[config.ScoreTarget, ...]]
    """The targets, whose labels are the outputs."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        tokens, positions, segment_ids = np.zeros((3, rows, seq_len), np.int32)
        num_labels = sum(len(target.labels) for target in cls.targets)
        labels = np.zeros((rows, seq_len, num_labels), np.float32)
        return cls(tokens, positions, segment_ids, np.zeros((rows, seq_len), bool), labels)

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of one random text per row, each with the first label."""
        batch = cls.empty(rows, seq_len)
        batch.tokens[:] = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len))
        batch.segment_ids[:] = 1
        batch.positions[:] = np.arange(seq_len)
        batch.is_last[:, -1] = True
        batch.labels[:, -1, 0] = 1
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write texts one after the other into an empty row."""
        start = 0
        for segment, piece in enumerate(pieces, start=1):
            end = start + len(piece.tokens)
            self.tokens[row, start:end] = piece.tokens
            self.segment_ids[row, start:end] = segment
            self.positions[row, start:end] = np.arange(end - start)
            self.is_last[row, end - 1] = True
            assert piece.values is not None
            self.labels[row, end - 1] = np.nan_to_num(piece.values, nan=-1.0)
            start = end


@functools.cache
def classification_batch(targets: tuple[config.ScoreTarget, ...]) -> type[ClassificationBatch]:
    """Return the batch type for the labels of these targets."""
    return type("ClassificationBatch", (ClassificationBatch,), {"targets": targets, "__module__": __name__})
