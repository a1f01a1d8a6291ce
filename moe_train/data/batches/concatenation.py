"""The rows of several sources without weights: each row once in an epoch, and every source spread evenly over it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np

from moe_train.data.batches.order import Order


class Concatenation:
    """The rows of several orders, numbered from 0 over all epochs.

    Row j of the n rows that a source has in an epoch comes at about (j + 1/2) / n of the epoch, so that no part of an epoch lacks
    a source that has rows for it.

    Args:
        orders: The rows of each source.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self._orders = orders
        self._lock = threading.Lock()  # the loader's thread and the caller's thread both locate rows
        self._turns = functools.lru_cache(2)(self._make_turns)  # a batch at the boundary of two epochs needs both

    def end(self, epoch: int) -> int:
        """Return the number of rows in the epochs up to and including `epoch`."""
        return sum(order.end(epoch) for order in self._orders)

    def locate(self, number: int) -> tuple[int, int]:
        """Return the source of a row, and the number of the row in the order of that source."""
        epoch = 0
        while number >= self.end(epoch):
            epoch += 1
        first = self.end(epoch - 1) if epoch else 0
        with self._lock:
            turn = int(self._turns(epoch)[number - first])
        for source, order in enumerate(self._orders):
            before = order.end(epoch - 1) if epoch else 0
            rows = order.end(epoch) - before
            if turn < rows:
                return source, before + turn
            turn -= rows
        raise AssertionError(f"row {number} is past the rows of its epoch")

    def _make_turns(self, epoch: int) -> np.ndarray:
        """Return (rows of the epoch,): which row comes at each place, counted through the sources one after the other."""
        places = []
        for order in self._orders:
            rows = order.end(epoch) - (order.end(epoch - 1) if epoch else 0)
            # The half centres each row in its share of the epoch.
            places.append((np.arange(rows) + 0.5) / rows)
        # Stable, so that ties (sources of equal size) are broken alike on every machine.
        return np.argsort(np.concatenate(places), kind="stable")
