"""The paired bootstrap: an interval for the difference of two models in a score that is no mean over items.

A corpus score such as BLEU or perplexity is computed from all items together, so that neither Student's interval nor Tango's holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_train.evaluate.intervals import Interval

RESAMPLES = 2000
"""Number of samples that are drawn from the items with replacement."""


class Bootstrap(NamedTuple):
    """The difference of two models over resampled items."""

    interval: Interval
    p_value: float
    """Two-sided p-value that the models are equal."""


def paired_bootstrap(
    aggregate: Callable[[list[Any]], float], new: Sequence[Any], old: Sequence[Any], confidence: float = 0.95, seed: int = 0
) -> Bootstrap:
    """Return the percentile interval of aggregate(new) - aggregate(old), where both models have the same resampled items.

    B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3. A single item gives the unbounded interval.

    Args:
        aggregate: computes the score of a list of values, one for each item.
        new: values of the new model.
        old: values of the old model, in the same order of items.
        confidence: level of the interval.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no items, or the models have different numbers of them.
    """
    count = len(new)
    if count == 0 or len(old) != count:
        raise ValueError(f"the models have {count} and {len(old)} values; a comparison needs the same items of both, at least one")
    if count == 1:
        return Bootstrap(Interval(-math.inf, math.inf), 1.0)
    generator = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        chosen = generator.integers(0, count, count)
        differences[resample] = aggregate([new[i] for i in chosen]) - aggregate([old[i] for i in chosen])
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    # The observed sample counts as one more, so that no p-value is 0.
    not_above = 1 + int(np.sum(differences <= 0))
    not_below = 1 + int(np.sum(differences >= 0))
    p_value = min(1.0, 2 * min(not_above, not_below) / (RESAMPLES + 1))
    return Bootstrap(Interval(float(low), float(high)), p_value)
