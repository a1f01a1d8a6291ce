"""The only type that leaves this package: one process's part of a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

Piece = tuple[np.ndarray, np.ndarray | None]
"""Token ids (n + 1,) of a part of an example and their loss mask; None where all are trained on."""


class PackedBatch(Protocol):
    """What the loader, `bench` and `plan` ask of an objective's batch type: a tuple of numpy arrays of shape (B, T)."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Padding alone."""

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Uniform tokens, without padding, all trained on: for measurements."""

    def fill_row(self, row: int, pieces: Sequence[Piece]) -> None:
        """Write pieces one after the other into an empty row."""

    def __iter__(self) -> Any: ...


class Batch(NamedTuple):
    """Packed sequences, numpy arrays of shape (B, T): int32, loss_mask bool.

    `targets[b, t]` is the token that follows `tokens[b, t]` in the same segment, and `loss_mask[b, t]` says whether
    it is trained on. `segment_ids` is 0 on padding and counts 1, 2, … along a row; `positions` restarts at 0
    in every segment.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Padding alone."""
        dtypes = (np.int32, np.int32, bool, np.int32, np.int32)
        return cls(*(np.zeros((rows, seq_len), dtype) for dtype in dtypes))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Uniform tokens, one segment a row."""
        tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len), dtype=np.int32)
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens.shape).copy()
        return cls(tokens, np.roll(tokens, -1, axis=1), np.ones(tokens.shape, bool), np.ones_like(tokens), positions)

    def fill_row(self, row: int, pieces: Sequence[Piece]) -> None:
        """Write pieces one after the other into an empty row."""
        start = 0
        for segment, (ids, mask) in enumerate(pieces, start=1):
            end = start + len(ids) - 1
            self.tokens[row, start:end] = ids[:-1]
            self.targets[row, start:end] = ids[1:]
            self.loss_mask[row, start:end] = True if mask is None else mask[1:]
            self.segment_ids[row, start:end] = segment
            self.positions[row, start:end] = np.arange(end - start)
            start = end
