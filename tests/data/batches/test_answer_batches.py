"""Rows of pairs, and of labelled answers with mismatched ones."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.batches.answer_batches import PreferenceBatch, SharedPromptBatch, UnpairedBatch, mismatched_segment
from moe_train.data.batches.batch import PackedBatch, StoredPiece
from moe_train.data.chat.example import SEGMENT_START
from moe_train.data.prepared.reference_values import ReferenceValues

S = SEGMENT_START


def piece(tokens: list[int], mask: list[int], answers: list[int], *values: float) -> StoredPiece:
    return StoredPiece(np.array(tokens), np.array(mask, bool), np.array(answers, np.uint8), np.array(values))


def test_a_pair_is_two_segments_of_one_row() -> None:
    pair = piece([1, 5, 6, 1, 5, 7, 8], [0, 0, 1, 0, 0, 1, 1], [S + 1, 1, 1, S + 2, 2, 2, 2])
    batch = PreferenceBatch.empty(1, 12)
    batch.fill_row(0, [pair._replace(reference=ReferenceValues(np.arange(5))), pair])
    assert batch.tokens[0].tolist() == [1, 5, 1, 5, 7, 1, 5, 1, 5, 7, 0, 0]
    assert batch.targets[0].tolist() == [5, 6, 5, 7, 8, 5, 6, 5, 7, 8, 0, 0]
    assert batch.loss_mask[0].tolist() == [bool(x) for x in (0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0)]
    assert batch.segment_ids[0].tolist() == [1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 0, 0]
    assert batch.answer_ids[0].tolist() == [1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 0, 0]
    assert batch.reference[0, :5].tolist() == [0, 1, 2, 3, 4] and np.isnan(batch.reference[0, 5:10]).all()


def test_both_answers_continue_one_prompt() -> None:
    pair = piece([1, 5, 4, 6, 1, 5, 4, 7, 8], [0, 0, 0, 1, 0, 0, 0, 1, 1], [S + 1, 1, 1, 1, S + 2, 2, 2, 2, 2], 0.0, 2)
    apart = piece([1, 6, 2, 7], [0, 1, 0, 1], [S + 1, 1, S + 2, 2], 0.0, 0)
    batch = SharedPromptBatch.empty(1, 9)
    batch.fill_row(0, [pair._replace(reference=ReferenceValues(np.arange(5))), apart])
    assert batch.tokens[0].tolist() == [1, 5, 4, 4, 7, 1, 2, 0, 0]
    assert batch.targets[0].tolist() == [5, 4, 6, 7, 8, 6, 7, 0, 0]
    assert batch.loss_mask[0].tolist() == [bool(x) for x in (0, 0, 1, 1, 1, 1, 1, 0, 0)]
    assert batch.segment_ids[0].tolist() == [1, 1, 2, 3, 3, 4, 5, 0, 0]
    assert batch.prompt_ids[0].tolist() == [1, 1, 1, 1, 1, 4, 5, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 2, 3, 0, 0, 0, 0]
    assert batch.answer_ids[0].tolist() == [1, 1, 1, 2, 2, 3, 4, 0, 0]
    assert batch.reference[0, :5].tolist() == [0, 1, 2, 3, 4] and np.isnan(batch.reference[0, 5:7]).all()


def test_synthetic_rows_with_one_prompt_have_no_padding() -> None:
    batch = SharedPromptBatch.synthetic(2, 21, 50, seed=0)
    assert (batch.segment_ids > 0).all() and batch.segment_ids.max() == 6 and set(batch.answer_ids[0]) == {1, 2, 3, 4}
    assert ((batch.prompt_ids != batch.segment_ids) == batch.loss_mask).all() and 8 < batch.loss_mask[0].sum() < 13
    assert [a.dtype for a in batch] == [a.dtype for a in SharedPromptBatch.empty(2, 21)]


def test_an_answer_may_have_several_segments() -> None:
    pair = piece([1, 5, 1, 6, 1, 7], [0, 1] * 3, [S + 1, 1, S + 1, 1, S + 2, 2])
    batch = PreferenceBatch.empty(1, 3)
    batch.fill_row(0, [pair])
    assert batch.segment_ids.tolist() == [[1, 2, 3]] and batch.answer_ids.tolist() == [[1, 1, 2]]


def test_a_mismatched_answer_follows_and_is_padding_to_the_loss() -> None:
    good = piece([1, 5, 6], [0, 0, 1], [S + 1, 1, 1], 1)
    bad = piece([1, 9, 9, 7, 8], [0, 0, 0, 1, 1], [S + 1, 1, 1, 1, 1], 0)
    segment = mismatched_segment(good, bad)
    assert segment.tokens.tolist() == [1, 5, 7, 8] and segment.loss_mask.tolist() == [False, False, True, True]
    batch = UnpairedBatch.empty(1, 12)
    batch.fill_row(0, [good._replace(mismatched=bad), bad._replace(mismatched=good)])
    assert batch.tokens[0].tolist() == [1, 5, 1, 5, 7, 1, 9, 9, 7, 1, 9, 9]
    assert batch.targets[0].tolist() == [5, 6, 5, 7, 8, 9, 9, 7, 8, 9, 9, 6]
    assert batch.segment_ids[0].tolist() == [1, 1, 0, 0, 0, 3, 3, 3, 3, 0, 0, 0]
    assert batch.mismatched_ids[0].tolist() == [0, 0, 2, 2, 2, 0, 0, 0, 0, 4, 4, 4]
    assert batch.answer_ids[0].tolist() == [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    assert batch.good[0].tolist() == [True, True] + [False] * 10


@pytest.mark.parametrize("batch_type", [PreferenceBatch, UnpairedBatch])
def test_synthetic_rows_are_pairs_without_padding(batch_type: type[PackedBatch]) -> None:
    batch = batch_type.synthetic(2, 10, 50, seed=0)
    assert isinstance(batch, PreferenceBatch | UnpairedBatch) and {array.shape[:2] for array in batch} == {(2, 10)}
    assert sorted(set(batch.answer_ids[0])) == [1, 2, 3, 4] and (batch.positions == 0).sum() == 8
    assert [a.dtype for a in batch] == [a.dtype for a in batch_type.empty(2, 10)]
