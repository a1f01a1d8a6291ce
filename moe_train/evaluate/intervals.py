"""Confidence intervals of scores: one rate, a mean, and the difference of two models on the same items.

Items that share a source (a document, a template) are not independent; an interval that is given their groups treats each group
as one observation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

NO_ERROR = 1e-12
"""Standard error of scores from 0 to 1 below which they are all equal but for rounding."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    """Lower bound."""
    high: float
    """Upper bound."""

    def contains(self, value: float) -> bool:
        """Return whether the interval contains a value, its bounds included."""
        return self.low <= value <= self.high


def rate_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a rate (E. B. Wilson, 1927), which stays useful for few trials and rates near 0 and 1.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
        confidence: Level of the interval.
    """
    low, high = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(float(low), float(high))


def mean_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[object] | None = None, confidence: float = 0.95
) -> Interval:
    """Return Student's interval of a mean, by groups where items share a source.

    The variance of the mean over G groups is G / (G - 1) * sum_g (sum of the residuals of group g)^2 / n^2, the cluster-robust
    estimate (Miller, arXiv:2411.00640, section 2.2), with G - 1 degrees of freedom; without groups each item is one. All values
    equal gives an interval of width 0, and a single group the unbounded one.

    Args:
        values: The score of each item.
        groups: The group of each item; None if the items are independent.
        confidence: Level of the interval.

    Raises:
        ValueError: There are no values.
    """
    mean = mean_and_error(values, groups)
    if mean.units == 1:
        return Interval(-math.inf, math.inf)
    reach = float(stats.t.ppf((1 + confidence) / 2, mean.units - 1)) * mean.error
    return Interval(mean.value - reach, mean.value + reach)


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float
    """Standard error; infinite with a single unit."""
    units: int
    """Number of independent observations: groups, or items without groups."""


def mean_and_error(values: Sequence[float] | np.ndarray, groups: Sequence[object] | None = None) -> Mean:
    """Return the mean of values and its standard error, cluster-robust if there are groups (see `mean_interval`).

    Raises:
        ValueError: There are no values.
    """
    scores = np.asarray(values, np.float64)
    if scores.size == 0:
        raise ValueError("there are no scores to average")
    mean = float(scores.mean())
    residuals = scores - mean
    if groups is not None:
        _, index = np.unique([repr(group) for group in groups], return_inverse=True)
        residuals = np.bincount(index, weights=residuals).astype(np.float64)
    G = residuals.size
    if G == 1:
        return Mean(mean, math.inf, 1)
    return Mean(mean, math.sqrt(G / (G - 1) * float(np.sum(residuals**2))) / scores.size, G)


def equal_values_interval(value: float, units: int, lowest: float, highest: float, confidence: float = 0.95) -> Interval:
    """Return an interval of a mean of values of which all observed ones are equal, so that none varies.

    A share s of units with another value stays unseen in n of them with probability (1 - s)^n. The interval allows for the
    largest share at the level, (1 - confidence) / 2 on each side, with the extreme values.

    Args:
        value: The value of every unit.
        units: Number of independent observations: groups, or items without groups; at least 1.
        lowest: The lowest value that a unit can have.
        highest: The highest value that a unit can have.
        confidence: Level of the interval.
    """
    unseen = 1 - ((1 - confidence) / 2) ** (1 / units)
    return Interval(value - unseen * (value - lowest), value + unseen * (highest - value))


def equal_differences_interval(difference: float, units: int, confidence: float = 0.95) -> Interval:
    """Return `equal_values_interval` of differences of scores, which are from -1 to 1."""
    return equal_values_interval(difference, units, -1.0, 1.0, confidence)


def equal_differences_p_value(difference: float, units: int) -> float:
    """Return the exact two-sided p-value of the sign test where all of some units differ in the same direction."""
    return 1.0 if difference == 0 else min(1.0, 2 * 0.5**units)


def paired_rates_interval(gained: int, lost: int, items: int, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval of the difference of two rates on the same items (Statistics in Medicine 17, 1998).

    It is Wilson's idea for pairs, and needs no large counts: also without any item on which the models differ it has a width.

    Args:
        gained: Number of items that only the new model solves.
        lost: Number of items that only the old model solves.
        items: Number of all items, at least 1.
        confidence: Level of the interval.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    estimate = (gained - lost) / items

    def excess(difference: float) -> float:
        """Distance from the estimate in standard errors, as z at a bound."""
        return (gained - lost - items * difference) / _tango_error(gained, lost, items, difference)

    def bound(target: float, end: float) -> float:
        # The score falls from the estimate, where it is 0, to beyond the target at -1 or 1, or the bound is that end itself.
        beyond = end * (1 - 1e-12)
        if abs(estimate - end) < 1e-12 or abs(excess(beyond)) <= z:
            return end
        return float(optimize.brentq(lambda difference: excess(difference) - target, estimate, beyond, xtol=1e-12))

    return Interval(bound(z, -1.0), bound(-z, 1.0))


def _tango_error(gained: int, lost: int, items: int, difference: float) -> float:
    """Return the standard error of gained - lost if the true difference is `difference`.

    The rate of lost items is its maximum-likelihood estimate under that condition, the larger root of A q^2 + B q + C.
    """
    A = 2 * items
    B = -gained - lost + (2 * items - gained + lost) * difference
    C = -lost * difference * (1 - difference)
    rate_lost = (math.sqrt(max(B * B - 4 * A * C, 0.0)) - B) / (2 * A)
    return math.sqrt(max(items * (2 * rate_lost + difference * (1 - difference)), 1e-300))


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value that two models solve equally many items (McNemar, Psychometrika 12, 1947).

    Of the items on which the models differ, each model solves half on average if they are equal. Without such items it is 1.
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons so that the chance of any false alarm stays at the level (S. Holm, 1979).

    Returns:
        The adjusted p-values in the same order; a comparison is significant at a level if its own is at most that.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
