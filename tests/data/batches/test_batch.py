"""A batch: rows filled with segments one after the other, padding behind them."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.batches.batch import Batch, BatchRows, StoredPiece


def test_segments_stand_one_after_the_other_in_a_row() -> None:
    batch = Batch.empty(2, 6)
    batch.fill_row(
        1, [StoredPiece(np.array([1, 5, 6, 2]), np.array([False, False, True, True])), StoredPiece(np.array([1, 7]), None)]
    )
    assert batch.tokens.tolist() == [[0] * 6, [1, 5, 6, 1, 0, 0]]
    assert batch.targets.tolist() == [[0] * 6, [5, 6, 2, 7, 0, 0]]
    assert batch.loss_mask.tolist() == [[False] * 6, [False, True, True, True, False, False]]
    assert batch.segment_ids.tolist() == [[0] * 6, [1, 1, 1, 2, 0, 0]]
    assert batch.positions.tolist() == [[0] * 6, [0, 1, 2, 0, 0, 0]]


def test_a_row_can_be_filled_to_its_end() -> None:
    batch = Batch.empty(1, 3)
    batch.fill_row(0, [StoredPiece(np.array([1, 2, 3, 4]), None)])
    assert batch.targets.tolist() == [[2, 3, 4]] and batch.loss_mask.all()


def test_an_empty_batch_is_padding() -> None:
    batch = Batch.empty(2, 3)
    assert [(array.shape, array.dtype.name, array.any()) for array in batch] == [
        ((2, 3), kind, False) for kind in ("int32", "int32", "bool", "int32", "int32")
    ]


def test_the_processes_divide_the_rows_of_a_batch() -> None:
    slices = [BatchRows(6, 8, index, 3).own_rows for index in range(3)]
    assert [list(range(6))[own_rows] for own_rows in slices] == [[0, 1], [2, 3], [4, 5]]


def test_rows_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of the 3 processes"):
        BatchRows(4, 8, process_count=3)
