"""Comparison of what lm-evaluation-harness records, without the harness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_train.evaluate.harness_comparison import HarnessRun, compare_harness, of_requirement
from moe_train.evaluate.paired_comparison import Requirement


def run_of(acc: list[float], perplexity: list[float]) -> HarnessRun:
    samples: list[dict[str, Any]] = []
    for number, (score, value) in enumerate(zip(acc, perplexity, strict=True)):
        samples.append({"doc_id": number, "filter": "none", "metrics": ["acc", "ppl"], "acc": score, "ppl": value})
    results = {"acc,none": np.mean(acc), "ppl,none": np.exp(np.mean(perplexity))}
    return HarnessRun("model", {"task": results}, {"task": samples}, {"task": {"acc": True, "ppl": False}})


def aggregate(metric: str) -> Any:
    assert metric == "ppl"
    return lambda values: float(np.exp(np.mean(values)))


def test_scores_are_compared_as_a_suites_and_others_by_the_bootstrap() -> None:
    new, old = run_of([1, 1, 0, 1], [2.0, 3.0, 4.0, 5.0]), run_of([0, 1, 0, 1], [2.5, 3.5, 4.5, 5.5])
    acc, ppl = compare_harness(new, old, aggregate, 0.95)
    assert acc.comparison.suite == "task/acc" and acc.is_score and acc.comparison.difference == 0.25
    assert "McNemar" in acc.comparison.method
    assert not ppl.is_score and not ppl.higher_is_better and ppl.comparison.interval.high < 0
    assert of_requirement(Requirement("task/acc", 0.0), [acc, ppl]) is acc
    assert of_requirement(Requirement("task", 0.0), [acc]) is acc
    for name, message in (("task", "several metrics"), ("task/ppl", "no mean of scores"), ("other", "no task or metric")):
        with pytest.raises(ValueError, match=message):
            of_requirement(Requirement(name, 0.0), [acc, ppl])


def test_other_items_and_a_metric_that_its_items_do_not_give() -> None:
    new, old = run_of([1, 1], [2.0, 3.0]), run_of([1, 1, 0], [2.0, 3.0, 1.0])
    with pytest.raises(ValueError, match="not asked the same items"):
        compare_harness(new, old, aggregate, 0.95)
    with pytest.raises(ValueError, match="which its items do not give"):
        compare_harness(new, new, lambda metric: None, 0.95)
