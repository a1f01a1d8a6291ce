"""Confidence intervals: their coverage where the truth is known, and published or independent values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moe_train.evaluate.intervals import (
    holm,
    mcnemar_p_value,
    mean_interval,
    paired_rates_interval,
    rate_interval,
)

SIMULATIONS = 1000
TOLERANCE = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
"""Three standard errors of a rate of 0.05 among the simulations."""


def test_wilson_is_the_root_of_its_equation() -> None:
    z = stats.norm.ppf(0.975)
    for successes, trials in ((0, 7), (3, 10), (199, 200)):
        for bound in rate_interval(successes, trials):
            error = math.sqrt(bound * (1 - bound) / trials)
            assert abs(successes / trials - bound) == pytest.approx(z * error, abs=1e-9)


def test_mean_without_groups_is_students() -> None:
    values = np.random.default_rng(0).normal(size=23)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(values, confidence=0.9) == pytest.approx(tuple(expected))


def test_each_item_as_its_own_group_changes_nothing() -> None:
    values = np.random.default_rng(1).normal(size=23)
    assert mean_interval(values, list(range(23))) == pytest.approx(mean_interval(values))


def test_copies_of_an_item_add_nothing() -> None:
    values = np.random.default_rng(2).normal(size=23)
    copied = np.repeat(values, 4)
    groups = np.repeat(np.arange(23), 4).tolist()
    assert mean_interval(copied, groups) == pytest.approx(mean_interval(values))


def test_one_group_says_nothing() -> None:
    assert mean_interval([0.0, 1.0], ["a", "a"]) == (-math.inf, math.inf)


def test_no_scores() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])


def test_groups_cover_the_mean() -> None:
    random = np.random.default_rng(3)
    covered = 0
    groups = np.repeat(np.arange(30), 5).tolist()
    for _ in range(SIMULATIONS):
        shared = np.repeat(random.normal(size=30), 5)
        covered += mean_interval(shared + random.normal(size=150), groups).contains(0)
    assert covered / SIMULATIONS == pytest.approx(0.95, abs=TOLERANCE)


def test_tango_is_the_root_of_its_equation() -> None:
    """The constrained estimate is found by maximizing the likelihood instead of by its closed form."""
    z = stats.norm.ppf(0.975)
    for gained, lost, items in ((9, 3, 50), (0, 4, 30), (12, 12, 25), (1, 0, 8)):
        for bound in paired_rates_interval(gained, lost, items):
            rates = np.linspace(max(0, -bound) + 1e-9, (1 - bound) / 2 - 1e-9, 200_001)
            tied = 1 - 2 * rates - bound
            likelihood = gained * np.log(rates + bound) + lost * np.log(rates) + (items - gained - lost) * np.log(tied)
            rate = rates[np.argmax(likelihood)]
            error = math.sqrt(items * (2 * rate + bound - bound**2))
            assert abs(gained - lost - items * bound) / error == pytest.approx(z, rel=1e-3)


def test_tango_without_a_difference_has_a_width() -> None:
    """The example of Tango's paper: 44 pairs, all alike."""
    assert paired_rates_interval(0, 0, 44) == pytest.approx((-0.0803, 0.0803), abs=5e-5)


def test_tango_at_the_ends() -> None:
    low, high = paired_rates_interval(10, 0, 10)
    assert high == 1 and 0 < low < 1
    assert paired_rates_interval(0, 10, 10) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("items", "gained", "lost"), [(50, 0.1, 0.1), (200, 0.05, 0.05), (500, 0.08, 0.03), (30, 0.2, 0.2)])
def test_tango_covers_the_difference(items: int, gained: float, lost: float) -> None:
    random = np.random.default_rng(4)
    counts = random.multinomial(items, [gained, lost, 1 - gained - lost], SIMULATIONS)
    covered = sum(paired_rates_interval(int(g), int(b), items).contains(gained - lost) for g, b, _ in counts)
    assert covered / SIMULATIONS == pytest.approx(0.95, abs=TOLERANCE)


def test_mcnemar() -> None:
    assert mcnemar_p_value(0, 0) == 1
    assert mcnemar_p_value(10, 2) == pytest.approx(2 * stats.binom.cdf(2, 12, 0.5))
    assert mcnemar_p_value(2, 10) == mcnemar_p_value(10, 2)


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
