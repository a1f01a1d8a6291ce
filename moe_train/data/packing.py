"""Which piece of which record lies in which row: a plan made from lengths alone, and the rows that it describes."""

from __future__ import annotations

import bisect
import hashlib
from typing import Literal, NamedTuple

import numpy as np

from moe_train.data.batch import Batch

TooLong = Literal["split", "truncate", "drop", "error"]


class Plan(NamedTuple):
    """Pieces of records, row after row, rows in the order of their first record.

    record, start, length (num_pieces,) int64: positions start to start + length of a record; row_pieces (num_rows + 1,)
    int64: row r holds the pieces row_pieces[r] to row_pieces[r + 1], one segment each.
    """

    seq_len: int
    record: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_pieces: np.ndarray
    num_dropped: int
    num_truncated: int
    num_split: int

    @property
    def num_rows(self) -> int:
        return len(self.row_pieces) - 1

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding."""
        return int(self.length.sum())

    @property
    def digest(self) -> str:
        total = hashlib.sha256(str(self.seq_len).encode())
        for array in (self.record, self.start, self.length, self.row_pieces):
            total.update(array.tobytes())
        return total.hexdigest()


def make_plan(lengths: np.ndarray, seq_len: int, too_long: TooLong) -> Plan:
    """Pack records of the given lengths (N,) into rows of seq_len; a length of 0 leaves the record out, as dropped.

    A record longer than a row is split into full rows and a rest, truncated to one row, dropped, or (an assertion: the
    caller has said which record it is) not there; no other record is ever split.
    Best fit, longest first, equal lengths together: the time grows with the number of different lengths.
    """
    lengths = np.asarray(lengths, np.int64)
    over = lengths > seq_len
    assert too_long != "error" or not over.any()
    kept = np.flatnonzero(lengths > 0 if too_long != "drop" else (lengths > 0) & ~over)
    if too_long == "split":
        pieces = -(-lengths[kept] // seq_len)
        record = np.repeat(kept, pieces)
        start = _ranges(np.zeros_like(pieces), pieces) * seq_len
    else:
        record, start = kept, np.zeros_like(kept)
    length = np.minimum(lengths[record] - start, seq_len)
    rows = _best_fit(length, seq_len)
    order = np.argsort(rows, kind="stable")  # within a row, records in their order
    firsts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(order[firsts])] = np.arange(len(firsts))
    order = np.argsort(rank[rows], kind="stable")
    counts = np.bincount(rank[rows], minlength=0)
    row_pieces = np.concatenate(([0], np.cumsum(counts)))
    num_over = int(over.sum())
    return Plan(
        seq_len,
        record[order],
        start[order],
        length[order],
        row_pieces,
        num_dropped=len(lengths) - len(kept),
        num_truncated=num_over if too_long == "truncate" else 0,
        num_split=num_over if too_long == "split" else 0,
    )


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row (from 0) of each piece: longest first, each into the fullest row that has room for it."""
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    rows_of = np.empty(len(lengths), np.int64)
    num_rows = done = 0
    rooms: list[int] = []  # what is left in the open rows, ascending
    rows_with: dict[int, list[np.ndarray]] = {}  # room -> rows

    def put(room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            if room not in rows_with:
                bisect.insort(rooms, room)
            rows_with.setdefault(room, []).append(rows)

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = order[done : done + count]
        done += count
        while len(pieces):
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                rows = np.concatenate(rows_with.pop(room))
            else:
                room, rows = capacity, np.arange(num_rows, num_rows - (-len(pieces) // (capacity // length)))
                num_rows += len(rows)
            each = room // length
            full = min(len(rows), len(pieces) // each)
            rows_of[pieces[: full * each]] = np.repeat(rows[:full], each)
            put(room - each * length, rows[:full])
            pieces = pieces[full * each :]
            if full < len(rows):  # fewer pieces are left than one more row would take
                rows_of[pieces] = rows[full]
                put(room - len(pieces) * length, rows[full : full + 1])
                put(room, rows[full + 1 :])
                pieces = pieces[:0]
    return rows_of


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, … (counts[0] numbers), then those from starts[1], and so on."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def empty_batch(rows: int, seq_len: int) -> Batch:
    """Padding alone."""
    zeros = [np.zeros((rows, seq_len), dtype) for dtype in (np.int32, np.int32, bool, np.int32, np.int32)]
    return Batch(*zeros)


def fill_rows(
    batch: Batch,
    at: np.ndarray,
    plan: Plan,
    rows: np.ndarray,
    tokens: np.ndarray,
    loss_mask: np.ndarray | None,
    offsets: np.ndarray,
) -> None:
    """Write the plan's `rows` (n,) into the empty rows `at` (n,) of `batch`; the rest is a `store.TokenStore`'s."""
    counts = plan.row_pieces[rows + 1] - plan.row_pieces[rows]
    pieces = _ranges(plan.row_pieces[rows], counts)
    lengths = plan.length[pieces]
    first = np.cumsum(counts) - counts  # of each row, among `pieces`
    segments = np.arange(len(pieces)) - np.repeat(first, counts) + 1
    before = np.cumsum(lengths) - lengths  # positions of all pieces before this one
    in_row = before - np.repeat(before[first], counts)
    positions = _ranges(np.zeros_like(lengths), lengths)
    target = np.repeat(np.repeat(at * plan.seq_len, counts) + in_row, lengths) + positions
    source = np.repeat(offsets[plan.record[pieces]] + plan.start[pieces], lengths) + positions
    batch.tokens.reshape(-1)[target] = tokens[source]
    batch.targets.reshape(-1)[target] = tokens[source + 1]
    batch.loss_mask.reshape(-1)[target] = True if loss_mask is None else loss_mask[source + 1]
    batch.segment_ids.reshape(-1)[target] = np.repeat(segments, lengths)
    batch.positions.reshape(-1)[target] = positions
