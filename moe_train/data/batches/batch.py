"""One process's part of a global batch: the only type that training receives from `data`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Packed sequences: numpy arrays of shape (B, T), int32 except for the boolean loss_mask.

    `targets[b, t]` is the token that follows `tokens[b, t]` in the same segment, and `loss_mask[b, t]` says whether it is
    trained on. `segment_ids` is 0 on padding and counts 1, 2, … along a row; `positions` restarts at 0 in every segment.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch that holds only padding."""
    shape = (rows, seq_len)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )


def fill_row(batch: Batch, row: int, pieces: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
    """Write pieces one after the other into an empty row; each is ids (n + 1,) and their loss mask (None: all are trained on)."""
    start = 0
    for segment, (ids, mask) in enumerate(pieces, start=1):
        end = start + len(ids) - 1
        batch.tokens[row, start:end] = ids[:-1]
        batch.targets[row, start:end] = ids[1:]
        batch.loss_mask[row, start:end] = True if mask is None else mask[1:]
        batch.segment_ids[row, start:end] = segment
        batch.positions[row, start:end] = np.arange(end - start)
        start = end
