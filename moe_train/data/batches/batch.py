"""The only type that leaves this package: one process's part of a global batch."""

from __future__ import annotations

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
