"""The batch type, one process's part of a global batch, and the record that says which part that is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from moe_train.data.chat.example import SEGMENT_START
from moe_train.data.media import MediaOfPiece
from moe_train.data.prepared.feature_values import FeaturesOfPiece
from moe_train.data.prepared.reference_values import ReferenceValues
from moe_train.data.prepared.teacher_values import TeacherValues


class SegmentIds(NamedTuple):
    """The ids of one segment, one more than its positions."""

    tokens: np.ndarray
    """(n + 1,) ids; the last one is only a target, and the first one only an input."""
    loss_mask: np.ndarray
    """(n + 1,) whether each id is trained on."""
    answer: int
    """Number of the answer that the segment belongs to, from 1."""


class StoredPiece(NamedTuple):
    """What a row takes from an example: a part of its ids, or all of them, and the numbers that belong to it."""

    tokens: np.ndarray
    """(n,) ids."""
    loss_mask: np.ndarray | None
    """(n,) whether each id is trained on; None if all are."""
    answers: np.ndarray | None = None
    """(n,) see `data.chat.example.Example.answers`; None for a single segment."""
    values: np.ndarray | None = None
    """Numbers of the whole example; None if the record kind has none."""
    reference: ReferenceValues | None = None
    """Outputs of the reference model; None if they are not stored."""
    teacher: TeacherValues | None = None
    """A teacher's predictions for the trained tokens; None if none are stored."""
    media: MediaOfPiece | None = None
    """The pictures, or the sound, of the example; None if it has none."""
    features: FeaturesOfPiece | None = None
    """Stored features of the pictures or the sound of the example; None if it has none, or they are not stored."""
    mismatched: StoredPiece | None = None
    """The example whose answer is set against this one's prompt; None if the objective uses none."""

    def segments(self) -> Iterator[SegmentIds]:
        """Yield the segments in order."""
        mask = np.ones(len(self.tokens), bool) if self.loss_mask is None else self.loss_mask
        if self.answers is None:
            yield SegmentIds(self.tokens, mask, 1)
            return
        starts = np.flatnonzero(self.answers >= SEGMENT_START).tolist()
        for start, end in itertools.pairwise([*starts, len(self.tokens)]):
            yield SegmentIds(self.tokens[start:end], mask[start:end], int(self.answers[start]) - SEGMENT_START)


@dataclass(frozen=True)
class BatchRows:
    """The rows of a global batch, and the share of them that this process fills.

    Raises:
        ValueError: If the rows cannot be divided equally among the processes.
    """

    batch_size: int
    """Rows in the global batch, over all processes."""
    seq_len: int
    """Positions in a row."""
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.process_count:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of the {self.process_count} processes")

    @property
    def own_rows(self) -> slice:
        """The rows of the global batch that this process fills."""
        per_process = self.batch_size // self.process_count
        return slice(self.process_index * per_process, (self.process_index + 1) * per_process)


@runtime_checkable
class PackedBatch(Protocol):
    """The interface of an objective's batch type: a tuple of numpy arrays of shape (B, T).

    The loader, `bench` and `plan` use it.
    """

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens without padding, all trained on, for measurements."""

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pieces one after the other into an empty row."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the arrays."""
        ...


class Batch(NamedTuple):
    """Packed sequences: numpy arrays of shape (B, T), int32 except for the bool loss_mask."""

    tokens: np.ndarray
    """Input tokens."""
    targets: np.ndarray
    """`targets[b, t]` is the token that follows `tokens[b, t]` in the same segment."""
    loss_mask: np.ndarray
    """Whether `targets[b, t]` is trained on."""
    segment_ids: np.ndarray
    """0 on padding; segments are numbered 1, 2, … along a row."""
    positions: np.ndarray
    """Position in the segment; restarts at 0 in every segment."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        dtypes = (np.int32, np.int32, bool, np.int32, np.int32)
        return cls(*(np.zeros((rows, seq_len), dtype) for dtype in dtypes))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens, with one segment per row."""
        tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len), dtype=np.int32)
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens.shape).copy()
        # The target of the last position is the first token, which is as random as any other.
        return cls(tokens, np.roll(tokens, -1, axis=1), np.ones(tokens.shape, bool), np.ones_like(tokens), positions)

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pieces one after the other into an empty row; each of their segments becomes one of the row."""
        place = RowPlace()
        for piece in pieces:
            for segment in piece.segments():
                place = write_segment(self, row, place, segment)


class RowPlace(NamedTuple):
    """Where the next segment of a row begins."""

    position: int = 0
    segment: int = 1
    """Number of the next segment."""
    first_position: int = 0
    """Position of its first token in its text: that many stand in an earlier segment, which it continues."""


class _SegmentArrays(Protocol):
    """The arrays of a batch that `write_segment` fills."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def segment_ids(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...


def write_segment(batch: _SegmentArrays, row: int, place: RowPlace, segment: SegmentIds) -> RowPlace:
    """Write a segment into a row, and return the place behind it, for a text of its own."""
    start = place.position
    end = start + len(segment.tokens) - 1
    # The last id is only a target, and the first one only an input, so the mask moves with the targets.
    batch.tokens[row, start:end] = segment.tokens[:-1]
    batch.targets[row, start:end] = segment.tokens[1:]
    batch.loss_mask[row, start:end] = segment.loss_mask[1:]
    batch.segment_ids[row, start:end] = place.segment
    # From 0 for a later piece of a split example too: it is a text of its own to attention.
    batch.positions[row, start:end] = place.first_position + np.arange(end - start)
    return RowPlace(end, place.segment + 1)
