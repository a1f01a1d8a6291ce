"""Batches of judged answers: preference pairs, and answers that are labelled as good or bad.

The answers of a row are numbered 1, 2, …: those of pair (or labelled answer) k are 2k - 1 and 2k. Every array is (B, T), so that
rows and positions are split over a mesh as tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from moe_train.data.batches.batch import Batch, RowPlace, SegmentIds, StoredPiece, write_segment

SYNTHETIC_ANSWERS = 4
"""Number of answers in a row of a synthetic batch."""


class PreferenceBatch(NamedTuple):
    """Packed preference pairs; tokens to positions are as in `Batch`, and the rest is float32 and int32."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    """Whether `targets[b, t]` belongs to an answer, and not to its prompt."""
    segment_ids: np.ndarray
    positions: np.ndarray
    answer_ids: np.ndarray
    """Number of the answer that a position belongs to, prompt included: 2k - 1 for chosen and 2k for rejected; 0 on padding."""
    reference: np.ndarray
    """Stored log-probability of each target under the reference model; NaN if none is stored."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        return cls(*Batch.empty(rows, seq_len), np.zeros((rows, seq_len), np.int32), np.zeros((rows, seq_len), np.float32))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens with two pairs per row, all of whose tokens belong to answers."""
        batch, answer_ids = _synthetic(rows, seq_len, vocab_size, seed)
        return cls(*batch, answer_ids, np.zeros((rows, seq_len), np.float32))

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pairs one after the other into an empty row."""
        place = RowPlace()
        for k, piece in enumerate(pieces):
            start = place.position
            for segment in piece.segments():
                behind = write_segment(self, row, place, segment)
                self.answer_ids[row, place.position : behind.position] = 2 * k + segment.answer
                place = behind
            self.reference[row, start : place.position] = np.nan if piece.reference is None else piece.reference


class UnpairedBatch(NamedTuple):
    """Packed labelled answers, each followed by its prompt with the answer of another record; arrays as in `PreferenceBatch`.

    Answer 2k - 1 is the labelled one, and 2k the mismatched one. In `segment_ids` the mismatched segments are padding, since they
    are not trained on.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    answer_ids: np.ndarray
    reference: np.ndarray
    mismatched_ids: np.ndarray
    """Segment ids of the mismatched segments alone; the labelled ones are padding here."""
    good: np.ndarray
    """Whether the labelled answer that a position belongs to is good (bool)."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        more = (np.zeros((rows, seq_len), np.int32), np.zeros((rows, seq_len), bool))
        return cls(*PreferenceBatch.empty(rows, seq_len), *more)

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens with two labelled answers per row, one of them good."""
        batch, answer_ids = _synthetic(rows, seq_len, vocab_size, seed)
        is_mismatched = answer_ids % 2 == 0
        mismatched_ids = np.where(is_mismatched, batch.segment_ids, 0)
        batch = batch._replace(segment_ids=np.where(is_mismatched, 0, batch.segment_ids))
        return cls(*batch, answer_ids, np.zeros((rows, seq_len), np.float32), mismatched_ids, answer_ids == 1)

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write labelled answers, each with its mismatched one, one after the other into an empty row."""
        place = RowPlace()
        for k, piece in enumerate(pieces):
            assert piece.values is not None and piece.mismatched is not None
            start = place.position
            for segment in piece.segments():
                behind = write_segment(self, row, place, segment)
                self.answer_ids[row, place.position : behind.position] = 2 * k + 1
                self.good[row, place.position : behind.position] = piece.values[0] == 1
                place = behind
            behind = write_segment(self, row, place, mismatched_segment(piece, piece.mismatched))
            mismatched = slice(place.position, behind.position)
            self.answer_ids[row, mismatched] = 2 * k + 2
            self.mismatched_ids[row, mismatched] = place.segment
            self.segment_ids[row, mismatched] = 0
            place = behind
            self.reference[row, start : place.position] = np.nan if piece.reference is None else piece.reference


def mismatched_segment(piece: StoredPiece, mismatched: StoredPiece) -> SegmentIds:
    """Return the prompt of a labelled answer followed by the answer of another record, which alone is in the loss mask."""
    own = next(piece.segments())
    another = next(mismatched.segments())
    prompt = own.tokens[: int(np.argmax(own.loss_mask))]
    answer_start = int(np.argmax(another.loss_mask))
    tokens = np.concatenate([prompt, another.tokens[answer_start:]])
    mask = np.concatenate([np.zeros(len(prompt), bool), another.loss_mask[answer_start:]])
    return SegmentIds(tokens, mask, 2)


def _synthetic(rows: int, seq_len: int, vocab_size: int, seed: int) -> tuple[Batch, np.ndarray]:
    """Return random tokens in segments of nearly equal size, and the answer that each segment is."""
    batch = Batch.synthetic(rows, seq_len, vocab_size, seed)
    segments = np.arange(seq_len, dtype=np.int32) * SYNTHETIC_ANSWERS // seq_len + 1
    starts = np.searchsorted(segments, segments)
    positions = (np.arange(seq_len) - starts).astype(np.int32)
    answer_ids = np.broadcast_to(segments, (rows, seq_len)).copy()
    return batch._replace(segment_ids=answer_ids.copy(), positions=np.broadcast_to(positions, (rows, seq_len)).copy()), answer_ids
