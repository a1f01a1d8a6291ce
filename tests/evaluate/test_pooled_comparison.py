"""Several runs of one recipe, pooled."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.evaluate.paired_comparison import Scores, compare
from moe_train.evaluate.pooled_comparison import compare_pooled
from tests.evaluate.test_intervals import SIMULATIONS


def scores(values: object) -> Scores:
    return {f"item-{i}": None if value is None else float(value) for i, value in enumerate(np.asarray(values, object))}


def test_one_run_is_compared_as_it_is() -> None:
    new, old = scores([1, 1, 0, 1]), scores([0, 1, 0, 1])
    assert compare_pooled("kpi", [new], old) == compare("kpi", new, old)


def test_runs_that_differ_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    old = random.random(50)
    gain = random.normal(0.1, 0.05, 50)
    same = compare_pooled("kpi", [scores(old + gain), scores(old + gain)], scores(old))
    single = compare("kpi", scores(old + gain), scores(old))
    assert same.interval == pytest.approx(single.interval)
    apart = compare_pooled("kpi", [scores(old + gain + 0.1), scores(old + gain - 0.1)], scores(old))
    assert apart.difference == pytest.approx(same.difference)
    assert apart.interval.low < same.interval.low and apart.interval.high > same.interval.high
    assert apart.p_value > same.p_value


def test_ungraded_items_and_equal_scores() -> None:
    new, old = [1, 0] * 20, [0, 0, 1, 1] * 10
    known = compare_pooled("kpi", [scores(new)] * 2, scores(old))
    unknown = compare_pooled("kpi", [scores(new), scores([1, None, *new[2:]])], scores(old))
    assert unknown.ungraded == 1 and unknown.p_value == 1 and unknown.interval.high > known.interval.high
    equal = compare_pooled("kpi", [scores([1, 1, 0])] * 2, scores([1, 1, 0]))
    assert equal.interval.low < 0 < equal.interval.high and equal.p_value == 1
    with pytest.raises(ValueError, match="none of its 1 items was graded"):
        compare_pooled("kpi", [scores([None]), scores([1])], scores([1]))


def test_the_interval_covers_items_and_seeds() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(SIMULATIONS):
        of_items, of_runs = random.normal(0, 0.2, 60), random.normal(0, 0.03, 3)
        noise = random.normal(0, 0.1, (3, 60))
        differences = np.clip(0.1 + of_items + of_runs[:, None] + noise, -1, 1)
        comparison = compare_pooled("kpi", [scores(row) for row in differences], scores(np.zeros(60)))
        covered += comparison.interval.contains(0.1)
    # At least the stated level, up to three standard errors of a simulated rate.
    assert covered / SIMULATIONS >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / SIMULATIONS)
