"""Comparison of two models by their scores on the same items, and the gate that a release has to pass.

An item is compared with itself, so that the difficulty of the items cancels: the interval is that of the mean of the differences
(Miller, arXiv:2411.00640, section 4.2), not that of two independent means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from moe_train.evaluate.intervals import (
    NO_ERROR,
    Interval,
    equal_differences_interval,
    equal_differences_p_value,
    holm,
    mcnemar_p_value,
    mean_and_error,
    mean_interval,
    paired_rates_interval,
)

Scores = Mapping[str, float | None]
"""The score of each item by its id, from 0 to 1; None where the item could not be graded."""
Verdict = Literal["better", "worse", "tied"]
"""What the comparison says of the new model: "tied" if the interval of the difference includes 0."""


class Comparison(NamedTuple):
    """The new model beside the old one on one suite."""

    suite: str
    """Name of the suite."""
    items: int
    """Number of items."""
    ungraded: int
    """Number of items that at least one of the models has no score for; the interval allows for any score of theirs."""
    new_mean: float
    """Mean score of the new model over the items that both have a score for."""
    old_mean: float
    """Mean score of the old model over the same items."""
    interval: Interval
    """Interval of the mean difference, new minus old."""
    p_value: float
    """Two-sided p-value that the models are equal; 1 if an item has no grade."""
    method: str
    """How interval and p-value were computed."""

    @property
    def difference(self) -> float:
        """Mean difference of the scores, new minus old."""
        return self.new_mean - self.old_mean


def compare(
    suite: str, new: Scores, old: Scores, groups: Mapping[str, object] | None = None, confidence: float = 0.95
) -> Comparison:
    """Compare the scores of two models item by item.

    Scores of 0 and 1 on independent items give Tango's interval and McNemar's exact test; other scores, and items in groups,
    Student's interval and test of the mean difference.

    Args:
        suite: Name of the suite, for messages.
        new: Scores of the new model.
        old: Scores of the old model.
        groups: The group of each item that shares its source with others; None if the items are independent.
        confidence: Level of the interval.

    Raises:
        ValueError: The models were not scored on the same items, or not on any.
    """
    check_same_items(suite, new, old)
    ids = list(new)
    graded = [key for key in ids if new[key] is not None and old[key] is not None]
    if not graded:
        raise ValueError(f"suite {suite}: none of its {len(ids)} items was graded for both models; see the items' errors")
    new_scores = np.array([new[key] for key in graded], np.float64)
    old_scores = np.array([old[key] for key in graded], np.float64)
    group_of_item = None if groups is None else [groups.get(key, key) for key in ids]
    worst = _interval([_bounded(new[key], 0) - _bounded(old[key], 1) for key in ids], group_of_item, confidence)
    best = _interval([_bounded(new[key], 1) - _bounded(old[key], 0) for key in ids], group_of_item, confidence)
    ungraded = len(ids) - len(graded)
    differences = new_scores - old_scores
    return Comparison(
        suite=suite,
        items=len(ids),
        ungraded=ungraded,
        new_mean=float(new_scores.mean()),
        old_mean=float(old_scores.mean()),
        interval=Interval(worst.low, best.high),
        p_value=1.0 if ungraded else _p_value(differences, group_of_item),
        method=_method(differences, group_of_item),
    )


def check_same_items(suite: str, new: Scores, old: Scores) -> None:
    """Raise ValueError if two models were not scored on the same items, or not on any."""
    if not new:
        raise ValueError(f"suite {suite} has no items, so there is nothing to compare; add items to its file")
    if differing := sorted(new.keys() ^ old.keys()):
        raise ValueError(
            f"suite {suite}: item {differing[0]} and {len(differing) - 1} more have a score for one of the models only; "
            "evaluate both models on the same items"
        )


def verdicts(comparisons: Sequence[Comparison], confidence: float = 0.95) -> list[Verdict]:
    """Return a verdict for each suite, at a level that holds for all suites together (Holm)."""
    per_suite: list[Verdict] = []
    for comparison, p_value in zip(comparisons, holm([c.p_value for c in comparisons]), strict=True):
        if p_value > 1 - confidence:
            per_suite.append("tied")
        else:
            per_suite.append("better" if comparison.difference > 0 else "worse")
    return per_suite


def _bounded(score: float | None, bound: float) -> float:
    """Return the score, or the bound in the place of an unknown one."""
    return bound if score is None else score


def _are_rates(differences: np.ndarray, groups: Sequence[object] | None) -> bool:
    """Return whether the differences are those of independent items that are solved or not."""
    return (groups is None or len(set(map(repr, groups))) == len(groups)) and bool(np.isin(differences, (-1, 0, 1)).all())


def _interval(differences: Sequence[float], groups: Sequence[object] | None, confidence: float) -> Interval:
    values = np.asarray(differences)
    if _are_rates(values, groups):
        return paired_rates_interval(int(np.sum(values == 1)), int(np.sum(values == -1)), values.size, confidence)
    mean = mean_and_error(values, groups)
    if mean.error < NO_ERROR:
        return equal_differences_interval(mean.value, mean.units, confidence)
    # The scores are from 0 to 1, so no difference is beyond.
    low, high = mean_interval(values, groups, confidence)
    return Interval(max(low, -1.0), min(high, 1.0))


def _p_value(differences: np.ndarray, groups: Sequence[object] | None) -> float:
    if _are_rates(differences, groups):
        return mcnemar_p_value(int(np.sum(differences == 1)), int(np.sum(differences == -1)))
    mean = mean_and_error(differences, groups)
    if mean.units == 1:
        return 1.0
    if mean.error < NO_ERROR:
        return equal_differences_p_value(mean.value, mean.units)
    return float(2 * stats.t.sf(abs(mean.value) / mean.error, mean.units - 1))


def _method(differences: np.ndarray, groups: Sequence[object] | None) -> str:
    if _are_rates(differences, groups):
        return "Tango's interval, McNemar's exact test"
    if groups is None:
        return "Student's t over items"
    return "Student's t over groups"


class Requirement(NamedTuple):
    """A condition on a suite: the new model may be worse than the old one by at most `margin`."""

    suite: str
    """Name of the suite."""
    margin: float
    """The largest loss of mean score that passes; negative to require a gain."""

    def is_met(self, comparison: Comparison) -> bool:
        """Return whether even the lower bound of the difference is within the margin."""
        return comparison.interval.low >= -self.margin


_REQUIREMENT = re.compile(r"\s*(?P<suite>[\w./-]+)\s*>=\s*base\s*(?:(?P<sign>[+-])\s*(?P<number>\d+(?:\.\d*)?|\.\d+))?\s*")


def parse_requirement(text: str) -> Requirement:
    """Parse a requirement such as `kpi >= base - 0.02`.

    Raises:
        ValueError: The text is no requirement, or its number exceeds 1.
    """
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"requirement {text!r} is not of the form SUITE >= base - MARGIN; write 'kpi >= base - 0.02', for example")
    margin = float(match["number"] or 0)
    if margin > 1:
        raise ValueError(f"requirement {text!r} has the margin {margin:g}, but scores are from 0 to 1; write 2 points as 0.02")
    return Requirement(match["suite"], -margin if match["sign"] == "+" else margin)
