"""The weights of a run with their shardings, from shapes alone."""

from __future__ import annotations

from moe_train.plan.weights import divisions


def test_divisions() -> None:
    assert sorted(divisions(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(divisions(64, 4))) == 84  # ways to hand six factors of two to four axes
