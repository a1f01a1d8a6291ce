"""How many positions of a pair both answers share, and whether one prompt for both pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_train.data.batches.answer_batches import SHARED_POSITIONS
from moe_train.data.prepared.store import TokenStore

LEAST_SAVED = 0.1
"""Share of the positions of all pairs that one prompt for both answers has to save to be worth it (docs/measurements.md)."""


def shared_positions(store: TokenStore) -> np.ndarray:
    """Return (N,) the positions that all segments of each pair share.

    Raises:
        ValueError: The set was prepared by a version that did not count them.
    """
    if not counts_shared_positions(store):
        raise ValueError(
            f"{store.path} was prepared by an older version, which did not count the tokens that both answers share; prepare it "
            "again, or set objective.shared_prompt to false"
        )
    return store.values[:, SHARED_POSITIONS].astype(np.int64)


def counts_shared_positions(store: TokenStore) -> bool:
    """Return whether a set of pairs states the positions that answers share."""
    return store.values.shape[1] > SHARED_POSITIONS


def share_saved(stores: Sequence[TokenStore]) -> float:
    """Return the share of the positions of all pairs that a row saves where both answers continue one prompt; 0 if unknown."""
    total = 0
    saved = 0
    for store in stores:
        if not counts_shared_positions(store):
            return 0.0
        total += int(store.lengths().sum())
        saved += int(((store.segments - 1) * shared_positions(store)).sum())
    return saved / total
