"""The batch type of rewards: packed preference pairs, whose answers are scored at their last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train.data.batches.batch import StoredPiece


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T)."""

    tokens: np.ndarray
    """Input tokens (int32); the last token of a segment is an input too."""
    segment_ids: np.ndarray
    positions: np.ndarray
    is_last: np.ndarray
    """Whether a position is the last of its answer, where the head reads its score."""
    answer_ids: np.ndarray
    """Number of the answer: 2k - 1 for the chosen and 2k for the rejected one of pair k; 0 on padding."""
    margins: np.ndarray
    """float32: the margin of the pair, at the last position of its chosen answer."""


class RewardBatch(_Arrays):
    """Packed preference pairs."""

    reads_last_token: ClassVar[bool] = True
    """The last token of a segment takes a position, too."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        dtypes = (np.int32, np.int32, np.int32, bool, np.int32, np.float32)
        return cls(*(np.zeros((rows, seq_len), dtype) for dtype in dtypes))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of one random pair per row."""
        batch = cls.empty(rows, seq_len)
        half = (seq_len + 1) // 2
        batch.tokens[:] = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len))
        batch.segment_ids[:] = batch.answer_ids[:] = 1 + (np.arange(seq_len) >= half)
        batch.positions[:] = np.arange(seq_len) % half
        batch.is_last[:, [half - 1, seq_len - 1]] = True
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pairs one after the other into an empty row."""
        start = 0
        segment = 0
        for k, piece in enumerate(pieces):
            ends: dict[int, int] = {}
            for part in piece.segments():
                segment += 1
                end = start + len(part.tokens)
                place = slice(start, end)
                self.tokens[row, place] = part.tokens
                self.segment_ids[row, place] = segment
                self.positions[row, place] = np.arange(end - start)
                self.answer_ids[row, place] = 2 * k + part.answer
                # Of an answer of several segments the last one counts, which repeats what came before.
                ends[part.answer] = end - 1
                start = end
            self.is_last[row, list(ends.values())] = True
            assert piece.values is not None
            self.margins[row, ends[1]] = piece.values[0]
