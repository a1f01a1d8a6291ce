"""F1, AUC and calibration against their definitions by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.label_metrics import auc, calibration_error, f1, label_metrics

TRUTH = np.array([True, True, False, False, True])
CHANCES = np.array([0.9, 0.4, 0.4, 0.1, 0.8])


def test_each_against_its_definition() -> None:
    assert f1(TRUTH, CHANCES > 0.5) == pytest.approx(2 * 1.0 * (2 / 3) / (1 + 2 / 3))
    pairs = [(p > q) + 0.5 * (p == q) for p in CHANCES[TRUTH] for q in CHANCES[~TRUTH]]
    assert auc(TRUTH, CHANCES) == pytest.approx(np.mean(pairs))
    bins = [(0.1, 0), (0.8, 1), (0.9, 1)]
    assert calibration_error(TRUTH, CHANCES) == pytest.approx((sum(abs(p - t) for p, t in bins) + 2 * abs(0.4 - 0.5)) / 5)


def test_what_is_not_defined_is_none() -> None:
    none = np.zeros(3, bool)
    assert f1(none, none) is None and auc(none, CHANCES[:3]) is None and auc(~none, CHANCES[:3]) is None
    assert calibration_error(none[:0], CHANCES[:0]) is None


def test_unknown_targets_count_for_nothing() -> None:
    head = config.ScoreHead(
        targets=(config.ScoreTarget(name="a", labels=("x", "y")), config.ScoreTarget(name="b", labels=("p", "q"), several=True))
    )
    scores = np.array([[2.0, 0, 1, -1], [0, 2, -1, -1], [0, 2, 1, 1]], np.float32)
    labels = np.array([[1, 0, 1, 0], [np.nan, np.nan, 0, 1], [1, 0, 1, 1]])
    rows = label_metrics(head, scores, labels)
    assert [(row["target"], row["label"]) for row in rows] == [("a", ""), ("a", "x"), ("a", "y"), ("b", ""), ("b", "p"), ("b", "q")]
    assert [row["texts"] for row in rows] == [2, 2, 0, 3, 2, 2]
    assert rows[0]["accuracy"] == 0.5 and rows[3]["accuracy"] == pytest.approx(2 / 3)
