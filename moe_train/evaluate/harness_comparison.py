"""Compare two models by what lm-evaluation-harness recorded for each item of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_train.evaluate.bootstrap import paired_bootstrap
from moe_train.evaluate.paired_comparison import Comparison, Requirement, compare

Aggregate = Callable[[list[Any]], float]
"""Computes a task's metric from the values of all items."""
AggregateOf = Callable[[str], Aggregate | None]
"""(name of a metric) -> how the harness aggregates it; None if it does not know the metric."""


class HarnessRun(NamedTuple):
    """What the harness found for one model."""

    name: str
    """How the user named the model."""
    results: Mapping[str, Mapping[str, Any]]
    """{task: {"metric,filter": value}}."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    """{task: one record for each item and filter}."""
    higher_is_better: Mapping[str, Mapping[str, bool | None]]
    """{task: {metric: whether larger values are better}}."""


class MetricComparison(NamedTuple):
    """The comparison of one metric of a task, whose name is `comparison.suite`: TASK/METRIC, or TASK/METRIC/FILTER."""

    task: str
    comparison: Comparison
    higher_is_better: bool
    is_score: bool
    """Whether the metric is the mean of scores from 0 to 1, of which larger ones are better."""


def compare_harness(new: HarnessRun, old: HarnessRun, aggregate_of: AggregateOf, confidence: float) -> list[MetricComparison]:
    """Compare two models in each metric of each task, item by item.

    Means of scores from 0 to 1 are compared as the scores of a suite are, and all other metrics by the paired bootstrap.

    Raises:
        ValueError: the models were not asked the same items, or a metric cannot be computed again from its items.
    """
    compared = []
    for task, samples in new.samples.items():
        for metric, filter_name in _metrics(samples):
            name = task if filter_name == "none" else f"{task} ({filter_name})"
            new_values = _values(samples, metric, filter_name)
            old_values = _values(old.samples.get(task, ()), metric, filter_name)
            if new_values.keys() != old_values.keys():
                raise ValueError(f"task {name}: the models were not asked the same items; run the same tasks on both")
            higher = new.higher_is_better.get(task, {}).get(metric) is not False
            label = f"{task}/{metric}" if filter_name == "none" else f"{task}/{metric}/{filter_name}"
            reported = [run.results[task][f"{metric},{filter_name}"] for run in (new, old)]
            is_score = higher and _are_mean_scores([new_values, old_values], reported)
            if is_score:
                comparison = compare(label, new_values, old_values, confidence=confidence)
            else:
                aggregate = aggregate_of(metric) or _mean
                comparison = _bootstrapped(label, aggregate, new_values, old_values, reported, confidence)
            compared.append(MetricComparison(task, comparison, higher, is_score))
    return compared


def of_requirement(requirement: Requirement, compared: Sequence[MetricComparison]) -> MetricComparison:
    """Return the comparison that a requirement names: a task with a single metric, or TASK/METRIC.

    Raises:
        ValueError: there is none, there are several, or the metric is no mean of scores from 0 to 1.
    """
    candidates = [one for one in compared if requirement.suite in (one.task, one.comparison.suite)]
    names = ", ".join(one.comparison.suite for one in candidates or compared)
    if not candidates:
        raise ValueError(f"--require names {requirement.suite}, which is no task or metric; there are {names}")
    if len(candidates) > 1:
        raise ValueError(f"--require names {requirement.suite}, which has several metrics; name one of {names}")
    if not candidates[0].is_score:
        raise ValueError(
            f"--require names {names}, which is no mean of scores from 0 to 1 of which larger ones are better; name another metric"
        )
    return candidates[0]


def _metrics(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the metrics and filters of a task's samples, each pair once."""
    pairs: dict[tuple[str, str], None] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            pairs[metric, sample["filter"]] = None
    return list(pairs)


def _values(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> dict[str, Any]:
    """Return {item: value} of one metric."""
    values = {}
    for sample in samples:
        if sample["filter"] == filter_name:
            values[f"{sample['doc_id']}"] = sample[metric]
    return values


def _are_mean_scores(values: Sequence[Mapping[str, Any]], reported: Sequence[float]) -> bool:
    """Return whether the values are scores from 0 to 1 whose means the harness reports."""
    for of_model, result in zip(values, reported, strict=True):
        scores = list(of_model.values())
        if not all(isinstance(score, bool | int | float | np.number) and 0 <= score <= 1 for score in scores):
            return False
        if not np.isclose(np.mean(scores), result, rtol=1e-6):
            return False
    return True


def _mean(values: list[Any]) -> float:
    return float(np.mean(values))


def _bootstrapped(
    label: str,
    aggregate: Aggregate,
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    reported: Sequence[float],
    confidence: float,
) -> Comparison:
    """Compare two models in a metric that is no mean of scores."""
    for values, result in zip((new, old), reported, strict=True):
        if not np.isclose(aggregate(list(values.values())), result, rtol=1e-6):
            raise ValueError(
                f"{label}: the harness reports {result:g}, which its items do not give, so that they cannot be resampled; "
                "leave the metric out of the task"
            )
    bootstrap = paired_bootstrap(aggregate, list(new.values()), list(old.values()), confidence)
    return Comparison(
        suite=label,
        items=len(new),
        ungraded=0,
        new_mean=float(reported[0]),
        old_mean=float(reported[1]),
        interval=bootstrap.interval,
        p_value=bootstrap.p_value,
        method="paired bootstrap of the metric",
    )
