"""Comparison of a recipe with a model: several runs that differ in their seed alone, pooled, on the same items.

Each run is a sample of what training with another seed may give, as each item is a sample of what may be asked. The variance of the
mean difference is estimated as the sum of that over items (of the runs' mean differences) and that over runs (of their means over
items). The share that belongs to both counts twice, so that the interval is rather too wide than too narrow; its degrees of
freedom are Satterthwaite's (Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from moe_train.evaluate.intervals import (
    NO_ERROR,
    Interval,
    equal_differences_interval,
    equal_differences_p_value,
    mean_and_error,
)
from moe_train.evaluate.paired_comparison import Comparison, Scores, check_same_items, compare


class _Pooled(NamedTuple):
    """A mean over runs and items."""

    value: float
    error: float
    degrees: float


def compare_pooled(
    suite: str, runs: Sequence[Scores], old: Scores, groups: Mapping[str, object] | None = None, confidence: float = 0.95
) -> Comparison:
    """Compare the scores of several runs of one recipe with those of a model; a single run is compared as `compare` does.

    Args:
        suite: Name of the suite, for messages.
        runs: Scores of each run.
        old: Scores of the model.
        groups: The group of each item that shares its source with others; None if the items are independent.
        confidence: Level of the interval.

    Raises:
        ValueError: The models were not scored on the same items, or not on any.
    """
    if len(runs) == 1:
        return compare(suite, runs[0], old, groups, confidence)
    for scores in runs:
        check_same_items(suite, scores, old)
    ids = list(old)
    graded = [key for key in ids if old[key] is not None and all(scores[key] is not None for scores in runs)]
    if not graded:
        raise ValueError(f"suite {suite}: none of its {len(ids)} items was graded for all models; see the items' errors")
    item_groups = None if groups is None else [groups.get(key, key) for key in ids]
    units = len(ids) if item_groups is None else len(set(map(repr, item_groups)))
    worst = _pooled(_matrix(runs, old, ids, 0, 1), item_groups)
    best = _pooled(_matrix(runs, old, ids, 1, 0), item_groups)
    new_mean = float(np.mean([[scores[key] for key in graded] for scores in runs]))
    return Comparison(
        suite=suite,
        items=len(ids),
        ungraded=len(ids) - len(graded),
        new_mean=new_mean,
        old_mean=float(np.mean([old[key] for key in graded])),
        interval=Interval(_interval(worst, units, confidence).low, _interval(best, units, confidence).high),
        p_value=1.0 if len(graded) < len(ids) else _p_value(worst, units),
        method=f"Student's t over items and {len(runs)} runs",
    )


def _matrix(runs: Sequence[Scores], old: Scores, ids: Sequence[str], unknown_new: float, unknown_old: float) -> np.ndarray:
    """Return the differences (runs, items), with the given bounds in the place of unknown scores."""
    differences = np.zeros((len(runs), len(ids)))
    for row, scores in enumerate(runs):
        for column, key in enumerate(ids):
            new, before = scores[key], old[key]
            differences[row, column] = (unknown_new if new is None else new) - (unknown_old if before is None else before)
    return differences


def _pooled(differences: np.ndarray, groups: Sequence[object] | None) -> _Pooled:
    """Return the mean of differences (runs, items) with its error and degrees of freedom."""
    over_items = mean_and_error(differences.mean(axis=0), groups)
    over_runs = mean_and_error(differences.mean(axis=1))
    variances = (over_items.error**2, over_runs.error**2)
    total = sum(variances)
    if total == 0 or math.isinf(total):
        return _Pooled(over_items.value, math.sqrt(total), 1.0)
    denominator = variances[0] ** 2 / (over_items.units - 1) + variances[1] ** 2 / (over_runs.units - 1)
    return _Pooled(over_items.value, math.sqrt(total), total**2 / denominator)


def _interval(pooled: _Pooled, units: int, confidence: float) -> Interval:
    if pooled.error < NO_ERROR:
        # All differences are equal, which does not show that further ones would be.
        return equal_differences_interval(pooled.value, units, confidence)
    reach = float(stats.t.ppf((1 + confidence) / 2, pooled.degrees)) * pooled.error
    # The scores are from 0 to 1, so no difference is beyond.
    return Interval(max(pooled.value - reach, -1.0), min(pooled.value + reach, 1.0))


def _p_value(pooled: _Pooled, units: int) -> float:
    if pooled.error < NO_ERROR:
        return equal_differences_p_value(pooled.value, units)
    return float(2 * stats.t.sf(abs(pooled.value) / pooled.error, pooled.degrees))
