"""Packing against a plain check: every token of every record once, in order, in its own segment."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.batches.batch import Batch, StoredPiece
from moe_train.data.batches.packing import Plan, TooLong, _best_fit, make_plan, packed_size


def all_rows(plan: Plan, ids: list[np.ndarray], masks: list[np.ndarray] | None = None) -> Batch:
    batch = Batch.empty(plan.num_rows, plan.seq_len)
    for row in range(plan.num_rows):
        mine = slice(plan.row_pieces[row], plan.row_pieces[row + 1])
        pieces = [(e, slice(a, a + n + 1)) for e, a, n in zip(plan.example[mine], plan.start[mine], plan.length[mine], strict=True)]
        batch.fill_row(row, [StoredPiece(ids[e][part], None if masks is None else masks[e][part]) for e, part in pieces])
    return batch


def segments(batch: Batch) -> list[tuple[list[int], list[int], list[bool]]]:
    """(tokens, targets, mask) of every segment, read off position by position; asserts the rules of a Batch."""
    found = []
    for tokens, targets, mask, ids, positions in zip(*(array.tolist() for array in batch), strict=True):
        groups = [(i, list(group)) for i, group in itertools.groupby(range(len(ids)), key=ids.__getitem__)]
        numbers = [i for i, _ in groups if i]
        assert numbers == list(range(1, len(numbers) + 1)), "segments count 1, 2, … along the row"
        for i, at in groups:
            if i == 0:
                assert at[-1] == len(ids) - 1, "padding is at the end"
                assert not any(tokens[t] or targets[t] or mask[t] or positions[t] for t in at)
            else:
                assert [positions[t] for t in at] == list(range(len(at))), "positions restart"
                found.append(([tokens[t] for t in at], [targets[t] for t in at], [mask[t] for t in at]))
    return found


@given(
    lengths=st.lists(st.integers(0, 40), max_size=60),
    seq_len=st.integers(1, 17),
    too_long=st.sampled_from(["split", "truncate", "drop"]),
    seed=st.sampled_from([None, (0, 0), (0, 1)]),
)
def test_every_record_is_there_once(lengths: list[int], seq_len: int, too_long: TooLong, seed: Any) -> None:
    random = np.random.default_rng(0)
    ids = [np.asarray([7 * i + 1, *random.integers(1, 2**16, length)], np.uint32) for i, length in enumerate(lengths)]
    masks = [random.random(len(i)) < 0.5 for i in ids]
    plan = make_plan(np.asarray(lengths, np.int64), seq_len, too_long, seed)

    expected = []
    for record, mask in zip(ids, masks, strict=True):
        pieces = [slice(s, min(s + seq_len, len(record) - 1)) for s in range(0, len(record) - 1, seq_len)]
        if len(pieces) > 1 and too_long != "split":
            pieces = pieces[:1] if too_long == "truncate" else []
        for piece in pieces:
            expected.append((record[piece].tolist(), record[1:][piece].tolist(), mask[1:][piece].tolist()))
    found = segments(all_rows(plan, ids, masks)) if plan.num_rows else []
    assert Counter(map(repr, found)) == Counter(map(repr, expected))
    over = sum(length > seq_len for length in lengths)
    assert plan.num_split == over * (too_long == "split") and plan.num_truncated == over * (too_long == "truncate")
    assert plan.num_dropped == lengths.count(0) + over * (too_long == "drop")
    assert plan.num_tokens == sum(len(tokens) for tokens, _, _ in expected)
    fill = np.sort(np.add.reduceat(plan.length, plan.row_pieces[:-1])) if plan.num_rows else np.zeros(0)
    assert len(fill) < 2 or fill[0] + fill[1] > seq_len, "no two rows would go into one"


@given(
    counts=st.dictionaries(st.integers(0, 40), st.integers(0, 30), max_size=12),
    seq_len=st.integers(1, 25),
    too_long=st.sampled_from(["split", "truncate", "drop"]),
)
def test_counted_lengths_pack_like_the_examples(counts: dict[int, int], seq_len: int, too_long: TooLong) -> None:
    plan = make_plan(np.repeat(list(counts), list(counts.values())).astype(np.int64), seq_len, too_long)
    assert packed_size(counts, seq_len, too_long) == (plan.num_rows, plan.num_tokens)


def test_rows_come_in_the_order_of_their_first_record() -> None:
    plan = make_plan(np.array([3, 9, 2, 9, 5, 4]), 10, "split")
    rows = [plan.example[a:b].tolist() for a, b in itertools.pairwise(plan.row_pieces)]
    assert rows == [[0, 2], [1], [3], [4, 5]]
    assert plan.num_tokens == 32


def test_without_a_mask_every_target_bears_loss() -> None:
    plan = make_plan(np.array([3, 2]), 8, "split")
    batch = all_rows(plan, [np.array([1, 5, 6, 2]), np.array([1, 7, 2])])
    assert batch.tokens.tolist() == [[1, 5, 6, 1, 7, 0, 0, 0]]
    assert batch.targets.tolist() == [[5, 6, 2, 7, 2, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[True] * 5 + [False] * 3]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert [array.dtype.name for array in batch] == ["int32", "int32", "bool", "int32", "int32"]


@given(lengths=st.lists(st.integers(1, 12), max_size=80))
def test_best_fit_takes_the_fullest_row_longest_first(lengths: list[int]) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        rooms.remove(min(fitting)) if fitting else None
        rooms.append((min(fitting) if fitting else 12) - length)
    rows, num_rows = _best_fit(np.asarray(lengths, np.int64), 12, None)
    assert sorted(12 - np.bincount(rows, lengths, num_rows).astype(int)) == sorted(rooms)


def test_every_seed_gives_other_neighbours_and_rows_as_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 3000).astype(int) + 1
    plans = [make_plan(lengths, 1024, "truncate", (7, epoch)) for epoch in range(2)]
    pairs = []
    for plan in plans:
        rows = [plan.example[a:b].tolist() for a, b in itertools.pairwise(plan.row_pieces)]
        pairs.append({(a, b) for row in rows for a in row for b in row if a < b})
    assert len(pairs[0] & pairs[1]) < 0.1 * len(pairs[0])
    unshuffled = make_plan(lengths, 1024, "truncate").num_rows
    assert all(plan.num_rows <= 1.01 * unshuffled for plan in plans)
    firsts = [plan.example[plan.row_pieces[:-1]] for plan in plans]
    assert abs(np.corrcoef(firsts[0], np.arange(len(firsts[0])))[0, 1]) < 0.2, "rows are shuffled"
    again = make_plan(lengths, 1024, "truncate", (7, 1))
    assert again.digest == plans[1].digest != plans[0].digest


def test_a_seed_means_the_same_on_every_machine() -> None:
    plan = make_plan(np.arange(1, 9), 10, "split", (3, 0, 1))
    assert [plan.example[a:b].tolist() for a, b in itertools.pairwise(plan.row_pieces)] == [[3, 5], [4, 0], [6, 2], [7, 1]]


def test_the_digest_tells_plans_apart() -> None:
    plans = [make_plan(np.array(lengths), seq_len, rule) for lengths, seq_len, rule in (
        ([3, 5], 8, "split"), ([5, 3], 8, "split"), ([3, 5], 9, "split"), ([3, 9], 8, "split"), ([3, 9], 8, "truncate"),
    )]  # fmt: skip
    assert len({plan.digest for plan in plans}) == len(plans)
    assert plans[0].digest == make_plan(np.array([3, 5]), 8, "drop").digest


@pytest.mark.parametrize("seq_len", [512, 32768])
def test_long_tails_pack_tightly(seq_len: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 1, seq_len)
    plan = make_plan(lengths, seq_len, "drop")
    assert plan.num_tokens / (plan.num_rows * seq_len) > 0.99
