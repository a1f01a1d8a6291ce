"""The paired bootstrap against Student's interval of a mean, and with values that are no numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_train.evaluate.bootstrap import paired_bootstrap
from moe_train.evaluate.intervals import mean_interval


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def test_for_a_mean_it_is_close_to_students_interval() -> None:
    generator = np.random.default_rng(0)
    new, old = generator.normal(0.1, 1, (2, 200))
    interval, p_value = paired_bootstrap(mean, list(new), list(old))
    np.testing.assert_allclose(interval, mean_interval(new - old), atol=0.02)
    assert p_value > 0.05


def test_a_ratio_of_sums_over_pairs() -> None:
    """As word perplexity, whose values are (log-likelihood, words)."""

    def ratio(pairs: list[tuple[float, int]]) -> float:
        return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)

    old = [(float(words), words) for words in range(1, 41)]
    new = [(2 * value, words) for value, words in old]
    interval, p_value = paired_bootstrap(ratio, new, old)
    np.testing.assert_allclose(interval, (1, 1))
    assert p_value < 0.01


def test_too_few_items() -> None:
    assert paired_bootstrap(mean, [1.0], [0.0]) == ((-math.inf, math.inf), 1.0)
    with pytest.raises(ValueError, match="0 and 0 values"):
        paired_bootstrap(mean, [], [])
