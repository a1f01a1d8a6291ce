"""Rows of several sources without weights: each once in an epoch, spread evenly."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.data.batches.concatenation import Concatenation


def orders(*rows_per_epoch: tuple[int, ...]) -> Any:
    """Stand-ins for orders of which epoch e has rows_per_epoch[e] rows."""
    return [SimpleNamespace(end=lambda epoch, rows=rows: sum(rows[: epoch + 1])) for rows in rows_per_epoch]


@pytest.mark.parametrize("rows", [((10, 9), (400, 401)), ((1, 1), (1, 1)), ((5, 5),), ((3, 4), (7, 7), (1, 1))])
def test_an_epoch_has_each_row_once_and_its_start_and_end_have_every_large_source(rows: Any) -> None:
    concatenation = Concatenation(orders(*rows))
    assert concatenation.end(0) == sum(source[0] for source in rows)
    start = 0
    for epoch in (0, 1):
        located = [concatenation.locate(number) for number in range(start, concatenation.end(epoch))]
        start = concatenation.end(epoch)
        expected = {(i, sum(source[:epoch]) + j) for i, source in enumerate(rows) for j in range(source[epoch])}
        assert set(located) == expected and len(located) == len(expected)
        for i, source in enumerate(rows):
            in_order = [row for at, row in located if at == i]
            assert in_order == sorted(in_order)
            half = Counter(at for at, _ in located[: len(located) // 2])[i]
            assert abs(half - source[epoch] / 2) <= 1
