"""The paired comparison of two models, and the gate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moe_train.evaluate.paired_comparison import Scores, compare, parse_requirement, verdicts
from tests.evaluate.test_intervals import SIMULATIONS, TOLERANCE


def scores(values: object) -> Scores:
    return {f"item-{i}": None if value is None else float(value) for i, value in enumerate(np.asarray(values, object))}


def test_rates_of_independent_items() -> None:
    comparison = compare("kpi", scores([1] * 9 + [0] * 3 + [1] * 38), scores([0] * 9 + [1] * 3 + [1] * 38))
    assert comparison.difference == pytest.approx(6 / 50)
    assert comparison.p_value == pytest.approx(2 * stats.binom.cdf(3, 12, 0.5))
    assert "McNemar" in comparison.method
    assert comparison.interval.low < 6 / 50 < comparison.interval.high


def test_other_scores_are_a_paired_t_test() -> None:
    random = np.random.default_rng(0)
    new, old = random.random(40), random.random(40)
    comparison = compare("kpi", scores(new), scores(old))
    expected = stats.ttest_rel(new, old)
    assert comparison.p_value == pytest.approx(expected.pvalue)
    assert comparison.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_equal_differences_prove_no_more_than_their_number() -> None:
    two = compare("kpi", scores([0.8] * 2), scores([0.5] * 2))
    # A share of 1 - 0.025 ** (1 / 2) of the items may differ unseen.
    assert two.interval == pytest.approx((0.3 - 0.842 * 1.3, 0.3 + 0.842 * 0.7), abs=1e-3) and two.p_value == 0.5
    many = compare("kpi", scores([0.8] * 500), scores([0.5] * 500))
    assert many.interval.low > 0.28 and many.p_value < 1e-9
    tied = compare("kpi", scores([0.3] * 9), scores([0.3] * 9), {"item-0": "a", "item-1": "a"})
    assert tied.interval.low < -0.3 and tied.p_value == 1


def test_items_of_one_source_count_once() -> None:
    random = np.random.default_rng(1)
    new, old = random.integers(0, 2, 30), random.integers(0, 2, 30)
    copies = compare("kpi", scores(np.repeat(new, 5)), scores(np.repeat(old, 5)), {f"item-{i}": i // 5 for i in range(150)})
    assert copies.p_value == pytest.approx(stats.ttest_rel(new, old).pvalue)
    assert "groups" in copies.method


def test_an_item_without_a_grade_may_have_any() -> None:
    known = compare("kpi", scores([1, 0, 1, 1]), scores([0, 1, 1, 1]))
    unknown = compare("kpi", scores([1, None, 1, 1]), scores([0, 1, 1, 1]))
    assert unknown.ungraded == 1 and unknown.p_value == 1
    assert unknown.interval.low == known.interval.low
    assert unknown.interval.high > known.interval.high


def test_models_on_other_items() -> None:
    with pytest.raises(ValueError, match="item-2 and 0 more have a score for one"):
        compare("kpi", scores([1, 1]), scores([1, 1, 0]))


def test_no_items_and_no_grades() -> None:
    with pytest.raises(ValueError, match="suite kpi has no items"):
        compare("kpi", {}, {})
    with pytest.raises(ValueError, match="none of its 1 items was graded"):
        compare("kpi", scores([None]), scores([1]))


def test_equal_models_seldom_differ() -> None:
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(SIMULATIONS):
        gained, lost, same = random.multinomial(400, [0.1, 0.1, 0.8])
        comparison = compare("kpi", scores([1] * gained + [0] * (lost + same)), scores([0] * gained + [1] * lost + [0] * same))
        alarms += verdicts([comparison]) != ["tied"]
    assert alarms / SIMULATIONS == pytest.approx(0.05, abs=TOLERANCE)


def test_verdicts_allow_for_the_number_of_suites() -> None:
    better = compare("kpi", scores([1] * 8 + [0] * 12), scores([0] * 20))
    barely = compare("kpi", scores([1] * 6 + [0] * 14), scores([0] * 20))
    worse = compare("kpi", scores([0] * 20), scores([1] * 12 + [0] * 8))
    assert verdicts([barely]) == ["better"]
    assert verdicts([barely] * 3) == ["tied"] * 3
    assert verdicts([better, worse]) == ["better", "worse"]


def test_requirement() -> None:
    assert parse_requirement("kpi >= base - 0.02") == ("kpi", 0.02)
    assert parse_requirement("kpi>=base+.1") == ("kpi", -0.1)
    assert parse_requirement("kpi >= base") == ("kpi", 0)
    small_loss = compare("kpi", scores([1] * 390 + [0] * 10), scores([1] * 391 + [0] * 9))
    assert parse_requirement("kpi >= base - 0.02").is_met(small_loss)
    assert not parse_requirement("kpi >= base").is_met(small_loss)


@pytest.mark.parametrize("text", ["kpi > base", "kpi >= 0.5", "kpi >= base - 2", "", "kpi >= base - -1"])
def test_a_text_that_is_no_requirement(text: str) -> None:
    with pytest.raises(ValueError, match=r"requirement .*write"):
        parse_requirement(text)
