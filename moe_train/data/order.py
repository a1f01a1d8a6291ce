"""The rows of one source, epoch after epoch: every epoch has each example once, in an order and with neighbours of its own."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import threading
from pathlib import Path

import numpy as np

from moe_train.atomic import new_directory
from moe_train.data.packing import Method, Plan, TooLong, make_plan
from moe_train.data.store import Piece, TokenStore

_LAYOUT = 1
_KEPT = 100_000  # examples from which on a plan is kept on disk: smaller ones are made in no time


class Order:
    """Packed rows of a store, numbered from 0 over all epochs; a row's number decides what is in it.

    seed: numbers that the order depends on, the epoch being one more; None: one epoch, in the order of the store.
    lengths (N,): positions that each example takes, 0 for those to leave out.
    """

    def __init__(
        self,
        store: TokenStore,
        lengths: np.ndarray,
        seq_len: int,
        too_long: TooLong,
        method: Method,
        seed: tuple[int, ...] | None,
        cache_dir: str | Path,
    ) -> None:
        self._lengths, self._seq_len, self._too_long = lengths, seq_len, too_long
        self._method: Method = method
        self._seed, self._cache = seed, Path(cache_dir) / "plans"
        self._decides = [_LAYOUT, store.manifest.hash, seq_len, too_long, method, seed]
        self._ends: list[int] = []  # of the epochs so far
        self._lock = threading.RLock()  # batches are made in a thread beside the one that asks
        self._plan = functools.lru_cache(2)(self._make)  # an epoch's border has two

    def plan(self, epoch: int = 0) -> Plan:
        """The rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def _make(self, epoch: int) -> Plan:
        seed = None if self._seed is None else (*self._seed, epoch)
        make = functools.partial(make_plan, self._lengths, self._seq_len, self._too_long, self._method, seed)
        if len(self._lengths) < _KEPT:
            return make()
        key = hashlib.sha256(json.dumps([*self._decides, epoch]).encode()).hexdigest()[:32]
        directory = self._cache / key
        if not directory.exists():
            plan = make()
            with contextlib.suppress(FileExistsError), new_directory(directory) as unfinished:  # or another process was quicker
                np.save(unfinished / "plan.npy", np.concatenate([plan[-3:], [plan.num_rows], plan.row_pieces, *plan[1:4]]))
        numbers = np.load(directory / "plan.npy", mmap_mode="r").view(np.ndarray)
        dropped, truncated, split, num_rows = numbers[:4].tolist()
        example, start, length = np.split(numbers[num_rows + 5 :], 3)
        return Plan(self._seq_len, example, start, length, numbers[4 : num_rows + 5], dropped, truncated, split)

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
