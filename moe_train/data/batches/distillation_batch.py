"""The batch type of distillation: packed sequences, and a teacher's most likely tokens at each position."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train.data.batches.batch import Batch, StoredPiece


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), or (B, T, k) for what a teacher says."""

    tokens: np.ndarray
    """Input tokens; this and the next four arrays are those of `Batch`."""
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    teacher_ids: np.ndarray
    """(B, T, k) int32: the teacher's most likely tokens at each position, all different; 0 where nothing is trained on."""
    teacher_logprobs: np.ndarray
    """(B, T, k) float16: their log-probabilities at the teacher's temperature."""
    teacher_tail: np.ndarray
    """(B, T) float32: log of the probability of all other tokens; -inf if there are none."""


class DistillationBatch(_Arrays):
    """Packed sequences with a teacher's predictions; `distillation_batch` makes the type for a number of tokens."""

    top_k: ClassVar[int]
    """Number of the teacher's tokens at each position."""
    temperature: ClassVar[float]
    """Temperature that the stored predictions must have."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        teacher = (
            np.zeros((rows, seq_len, cls.top_k), np.int32),
            np.zeros((rows, seq_len, cls.top_k), np.float16),
            np.zeros((rows, seq_len), np.float32),
        )
        return cls(*Batch.empty(rows, seq_len), *teacher)

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of random tokens, with a teacher to whom consecutive ids and the rest are equally likely."""
        tokens = Batch.synthetic(rows, seq_len, vocab_size, seed)
        batch = cls(*tokens, *cls.empty(rows, seq_len)[5:])
        batch.teacher_ids[:] = (tokens.targets[..., None] + np.arange(cls.top_k)) % vocab_size
        batch.teacher_logprobs[:] = batch.teacher_tail[:] = -np.log(cls.top_k + 1)
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pieces one after the other into an empty row; each piece becomes a segment."""
        Batch(*self[:5]).fill_row(row, pieces)
        start = 0
        for piece in pieces:
            end = start + len(piece.tokens) - 1
            assert piece.teacher is not None, "sources without a teacher are refused when they are opened"
            teacher = piece.teacher.limited(self.top_k)
            # A teacher's values are stored for trained tokens only.
            trained = start + np.flatnonzero(self.loss_mask[row, start:end])
            self.teacher_ids[row, trained] = teacher.ids
            self.teacher_logprobs[row, trained] = teacher.logprobs
            self.teacher_tail[row, trained] = teacher.tail
            start = end


@functools.cache
def distillation_batch(top_k: int, temperature: float) -> type[DistillationBatch]:
    """Return the batch type for a number of teacher tokens at each position, and a temperature."""
    attributes = {"top_k": top_k, "temperature": temperature, "__module__": __name__}
    return type("DistillationBatch", (DistillationBatch,), attributes)
