"""The order of the rows of one source over all epochs: every epoch has each example once, in a new order with new neighbours."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.batches.packing import Plan, TooLong, concatenated, make_plan
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.machine.files import new_directory

log = logging.getLogger(__name__)
_LAYOUT = 3  # version of the layout of plan.npy and of its key
_KEPT = 100_000  # plans of at least this many examples are cached on disk; smaller ones are fast to make


class Shuffle(NamedTuple):
    """How to shuffle examples; every epoch gets a new order, which is a function of `seed` and the epoch."""

    seed: tuple[int, ...]
    window: int | None = None
    """Positions of the consecutive examples that are shuffled and packed together, so that what is read at a time is close together
    in the store; None for all examples.
    """


class Order:
    """Packed rows of a store, numbered from 0 over all epochs; the number of a row decides its content.

    Args:
        store: The examples.
        lengths: (N,) positions that each example takes; 0 for those to leave out.
        seq_len: Positions in a row.
        too_long: What to do with examples longer than a row (see `make_plan`).
        shuffle: How to shuffle; None for one epoch in the order of the store.
        cache_dir: Where plans of many examples are cached.
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
        # The same store takes more positions where answers are set against other prompts.
        self._decides = [_LAYOUT, store.manifest.hash, seq_len, too_long, shuffle, int(lengths.sum())]
        self._ends: list[int] = []  # number of rows up to the end of each epoch so far
        self._lock = threading.RLock()  # the loader's thread and the caller's thread both use the plans
        self._plan = functools.lru_cache(2)(self._make)  # a batch at the boundary of two epochs needs both plans

    def plan(self, epoch: int = 0) -> Plan:
        """Return the rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def _make(self, epoch: int) -> Plan:
        """Make the plan of an epoch, or read it from the disk cache."""
        if len(self._lengths) < _KEPT:
            return self._planned(epoch)
        key = hashlib.sha256(json.dumps([*self._decides, epoch]).encode()).hexdigest()[:32]
        directory = self._cache / key
        numbers = _read(directory)
        if numbers is None:
            plan = self._planned(epoch)
            # One array: dropped, truncated, split, num_rows; then row_pieces; then example, start and length.
            made = np.concatenate([plan[-3:], [plan.num_rows], plan.row_pieces, *plan[1:4]])
            _write(directory, made)
            # What was just written is read back, so that the processes of a host share one copy in memory.
            numbers = _read(directory)
            numbers = made if numbers is None else numbers
        dropped, truncated, split, num_rows = numbers[:4].tolist()
        # 4 counts, then num_rows + 1 entries of row_pieces, then three arrays of equal length.
        example, start, length = np.split(numbers[num_rows + 5 :], 3)
        return Plan(self._seq_len, example, start, length, numbers[4 : num_rows + 5], dropped, truncated, split)

    def _planned(self, epoch: int) -> Plan:
        """Plan each window by itself; the order of the windows depends on the epoch."""
        if self._shuffle is None:
            return make_plan(self._lengths, self._seq_len, self._too_long)
        seed = (*self._shuffle.seed, epoch)
        # Sorting raw bits in place of a permutation of numpy, which may change between its versions.
        turns = np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(self._starts) - 1), kind="stable").tolist()
        plans = []
        for turn in turns:
            a, b = self._starts[turn : turn + 2]
            plan = make_plan(self._lengths[a:b], self._seq_len, self._too_long, (*seed, turn))
            # The plan counts examples from the start of its window.
            plans.append(plan._replace(example=plan.example + a))
        return concatenated(plans)

    def end(self, epoch: int) -> int:
        """Return the number of rows in the epochs up to and including `epoch`."""
        with self._lock:
            while len(self._ends) <= epoch:
                # Every epoch has its own plan, and so possibly another number of rows.
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + self._plan(len(self._ends)).num_rows)
            return self._ends[epoch]

    def rows_with(self, examples: np.ndarray, num_rows: int) -> list[int]:
        """Return which of the first `num_rows` rows hold a piece of one of the examples, in ascending order."""
        rows: list[int] = []
        epoch = 0
        first = 0
        while first < num_rows:
            plan = self.plan(epoch)
            pieces = np.flatnonzero(np.isin(plan.example, examples))
            # The last row that begins at the piece or before it; rows are never empty.
            in_epoch = np.unique(np.searchsorted(plan.row_pieces, pieces, side="right") - 1)
            rows += (first + in_epoch).tolist()
            first = self.end(epoch)
            epoch += 1
        return [row for row in rows if row < num_rows]

    def pieces(self, row: int) -> list[ExampleSlice]:
        """Return the pieces in a row, segment by segment."""
        # Plan further epochs until one contains the row.
        while row >= self.end(len(self._ends) - 1 if self._ends else 0):
            self.end(len(self._ends))
        epoch = bisect.bisect_right(self._ends, row)
        plan = self.plan(epoch)
        row -= self._ends[epoch - 1] if epoch else 0
        row_slice = slice(*plan.row_pieces[row : row + 2].tolist())
        return [ExampleSlice(*piece) for piece in zip(*(array[row_slice].tolist() for array in plan[1:4]), strict=True)]


def _windows(lengths: np.ndarray, window: int | None) -> list[int]:
    """Return the first example of each window of about `window` positions, and the end of the last window."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    count = max(round(total / window), 1) if window else 1
    borders = np.searchsorted(ends, np.arange(1, count) * total // count) + 1
    # An example longer than a window makes borders coincide, and no window may be empty.
    return np.unique([0, *borders, len(lengths)]).tolist()


def _write(directory: Path, numbers: np.ndarray) -> None:
    """Write the numbers of a plan and their hash; that they cannot be written is logged and no error."""
    try:
        with contextlib.suppress(FileExistsError), new_directory(directory) as unfinished:  # another process may be faster
            np.save(unfinished / "plan.npy", numbers)
            (unfinished / "sha256").write_text(_hash(unfinished / "plan.npy"))
    except OSError as error:
        log.warning("%s cannot be written (%s), so each process plans its rows anew", directory, error.strerror or error)


def _read(directory: Path) -> np.ndarray | None:
    """Return the mapped numbers of a plan; None if there are none, or if they are damaged, in which case they are removed."""
    if not directory.is_dir():
        return None
    file = directory / "plan.npy"
    try:
        if (directory / "sha256").read_bytes() == _hash(file).encode():
            return np.load(file, mmap_mode="r").view(np.ndarray)
    except FileNotFoundError:
        pass  # a file of it is missing, or another process has removed it
    log.warning("%s is damaged; the rows are planned again", file)
    shutil.rmtree(directory, ignore_errors=True)
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
