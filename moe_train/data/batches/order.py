"""The rows of one source, epoch after epoch: every epoch has each example once, in an order and with neighbours of its own."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.batches.packing import Plan, TooLong, concatenated, make_plan
from moe_train.data.prepared.store import Piece, TokenStore
from moe_train.machine.files import new_directory

_LAYOUT = 2  # of plan.npy and its key
_KEPT = 100_000  # number of examples from which on a plan is kept on disk; a smaller one is made in no time


class Shuffle(NamedTuple):
    """How examples are shuffled: anew in every epoch, as a function of `seed` and the epoch.

    window: positions of the consecutive examples that are shuffled and packed together, so that what is read at a time
    lies close together (None: all examples).
    """

    seed: tuple[int, ...]
    window: int | None = None


class Order:
    """Packed rows of a store, numbered from 0 over all epochs; a row's number decides what is in it.

    Args:
        store: the examples.
        lengths: (N,) positions that each example takes, 0 for those to leave out.
        seq_len: positions of a row.
        too_long: what to do with examples longer than that (see `make_plan`).
        shuffle: None for one epoch in the order of the store.
        cache_dir: where plans of many examples are kept.
    """

    def __init__(
        self,
        store: TokenStore,
        lengths: np.ndarray,
        seq_len: int,
        too_long: TooLong,
        shuffle: Shuffle | None,
        cache_dir: str | Path,
    ) -> None:
        self._starts = _windows(lengths, shuffle.window if shuffle else None)
        self._lengths = lengths
        self._seq_len = seq_len
        self._too_long = too_long
        self._shuffle = shuffle
        self._cache = Path(cache_dir) / "plans"
        self._decides = [_LAYOUT, store.manifest.hash, seq_len, too_long, shuffle]
        self._ends: list[int] = []  # of the epochs so far
        self._lock = threading.RLock()  # batches are made in a thread beside the one that asks
        self._plan = functools.lru_cache(2)(self._make)  # a batch at the border of two epochs needs both plans

    def plan(self, epoch: int = 0) -> Plan:
        """The rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def _make(self, epoch: int) -> Plan:
        if len(self._lengths) < _KEPT:
            return self._planned(epoch)
        key = hashlib.sha256(json.dumps([*self._decides, epoch]).encode()).hexdigest()[:32]
        directory = self._cache / key
        if not directory.exists():
            plan = self._planned(epoch)
            with contextlib.suppress(FileExistsError), new_directory(directory) as unfinished:  # or another process was quicker
                np.save(unfinished / "plan.npy", np.concatenate([plan[-3:], [plan.num_rows], plan.row_pieces, *plan[1:4]]))
        numbers = np.load(directory / "plan.npy", mmap_mode="r").view(np.ndarray)
        dropped, truncated, split, num_rows = numbers[:4].tolist()
        example, start, length = np.split(numbers[num_rows + 5 :], 3)
        return Plan(self._seq_len, example, start, length, numbers[4 : num_rows + 5], dropped, truncated, split)

    def _planned(self, epoch: int) -> Plan:
        """Plan each window by itself, the windows in an order that belongs to the epoch."""
        if self._shuffle is None:
            return make_plan(self._lengths, self._seq_len, self._too_long)
        seed = (*self._shuffle.seed, epoch)
        turns = np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(self._starts) - 1), kind="stable").tolist()
        plans = []
        for turn in turns:
            a, b = self._starts[turn : turn + 2]
            plan = make_plan(self._lengths[a:b], self._seq_len, self._too_long, (*seed, turn))
            plans.append(plan._replace(example=plan.example + a))
        return concatenated(plans)

    def end(self, epoch: int) -> int:
        """The number of rows in the epochs up to and including `epoch`."""
        with self._lock:
            while len(self._ends) <= epoch:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + self._plan(len(self._ends)).num_rows)
            return self._ends[epoch]

    def pieces(self, row: int) -> list[Piece]:
        """What is in a row, segment by segment."""
        while row >= self.end(len(self._ends) - 1 if self._ends else 0):
            self.end(len(self._ends))
        epoch = bisect.bisect_right(self._ends, row)
        plan = self.plan(epoch)
        row -= self._ends[epoch - 1] if epoch else 0
        mine = slice(*plan.row_pieces[row : row + 2].tolist())
        return [Piece(*piece) for piece in zip(*(array[mine].tolist() for array in plan[1:4]), strict=True)]


def _windows(lengths: np.ndarray, window: int | None) -> list[int]:
    """Where windows of about that many positions begin, and the end of the last."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    count = max(round(total / window), 1) if window else 1
    between = np.searchsorted(ends, np.arange(1, count) * total // count) + 1
    return np.unique([0, *between, len(lengths)]).tolist()
