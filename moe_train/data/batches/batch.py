"""The only type that leaves this package: one process's part of a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Packed sequences, numpy arrays of shape (B, T): int32, loss_mask bool.

    `targets[b, t]` is the token that follows `tokens[b, t]` in the same segment, and `loss_mask[b, t]` says whether
    predicting it bears loss. `segment_ids` is 0 on padding and counts 1, 2, … along a row; `positions` restarts at 0
    in every segment.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def empty_batch(rows: int, seq_len: int) -> Batch:
    """Padding alone."""
    zeros = [np.zeros((rows, seq_len), dtype) for dtype in (np.int32, np.int32, bool, np.int32, np.int32)]
    return Batch(*zeros)


def fill_row(batch: Batch, row: int, pieces: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
    """Write pieces, ids (n + 1,) and their loss mask (None: all bear loss), one after the other into an empty row."""
    at = 0
    tokens, targets, loss_mask, segment_ids, positions = (whole[row] for whole in batch)
    for segment, (ids, mask) in enumerate(pieces, start=1):
        end = at + len(ids) - 1
        tokens[at:end] = ids[:-1]
        targets[at:end] = ids[1:]
        loss_mask[at:end] = True if mask is None else mask[1:]
        segment_ids[at:end] = segment
        positions[at:end] = np.arange(end - at)
        at = end
