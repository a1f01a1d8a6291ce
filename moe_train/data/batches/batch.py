"""The batch type, one process's part of a global batch, and the record that says which part that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

TokensAndMask = tuple[np.ndarray, np.ndarray | None]
"""Token ids (n + 1,) of a part of an example, and their loss mask; None if all are trained on."""


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

    def fill_row(self, row: int, pieces: Sequence[TokensAndMask]) -> None:
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

    def fill_row(self, row: int, pieces: Sequence[TokensAndMask]) -> None:
        """Write pieces one after the other into an empty row; each piece becomes a segment."""
        start = 0
        for segment, (ids, mask) in enumerate(pieces, start=1):
            end = start + len(ids) - 1
            # The last id is only a target, and the first one only an input, so the mask moves with the targets.
            self.tokens[row, start:end] = ids[:-1]
            self.targets[row, start:end] = ids[1:]
            self.loss_mask[row, start:end] = True if mask is None else mask[1:]
            self.segment_ids[row, start:end] = segment
            # From 0 for a later piece of a split example too: it is a text of its own to attention.
            self.positions[row, start:end] = np.arange(end - start)
            start = end
