"""How good predictions of labels are: accuracy, F1, area under the ROC curve, and calibration."""

from __future__ import annotations

import numpy as np

from moe_train import config
from moe_train.evaluate.scores import outputs_of, predicted, probabilities
from moe_train.machine.files import JsonObject

BINS = 10
"""Number of bins of equal width in which calibration is measured."""


def label_metrics(head: config.ScoreHead, scores_NY: np.ndarray, labels_NY: np.ndarray) -> list[JsonObject]:
    """Return a row for each target, and one for each of its labels.

    Args:
        head: the targets.
        scores_NY: scores of each text.
        labels_NY: 1 or 0 for each label; NaN for all labels of a target that is not known.

    Returns:
        Rows with target, label (empty for the whole target), texts, accuracy, f1 (of a target: the mean over its labels), auc and
        calibration_error. A value that is not defined, such as the AUC of a label that no text has, is None.
    """
    rows: list[JsonObject] = []
    for target, outputs in outputs_of(head):
        is_known = ~np.isnan(labels_NY[:, outputs.start])
        truth_NY = labels_NY[is_known, outputs] > 0
        chances_NY = probabilities(target, scores_NY[is_known, outputs])
        chosen_NY = predicted(target, chances_NY)
        of_labels: list[JsonObject] = []
        for index, label in enumerate(target.labels):
            truth = truth_NY[:, index]
            of_labels.append(
                {
                    "target": target.name,
                    "label": label,
                    "texts": int(truth.sum()),
                    "accuracy": _mean(chosen_NY[:, index] == truth),
                    "f1": f1(truth, chosen_NY[:, index]),
                    "auc": auc(truth, chances_NY[:, index]),
                    "calibration_error": calibration_error(truth, chances_NY[:, index]),
                }
            )
        rows.append(
            {
                "target": target.name,
                "label": "",
                "texts": int(is_known.sum()),
                "accuracy": _mean((chosen_NY == truth_NY).all(axis=1)),
                "f1": _mean_of_defined([row["f1"] for row in of_labels]),
                "auc": _mean_of_defined([row["auc"] for row in of_labels]),
                "calibration_error": _mean_of_defined([row["calibration_error"] for row in of_labels]),
            }
        )
        rows += of_labels
    return rows


def f1(truth: np.ndarray, chosen: np.ndarray) -> float | None:
    """Return the harmonic mean of precision and recall; None if no text has the label and none is predicted to."""
    hits = int((truth & chosen).sum())
    total = int(truth.sum() + chosen.sum())
    return 2 * hits / total if total else None


def auc(truth: np.ndarray, chances: np.ndarray) -> float | None:
    """Return the probability that a text with the label has a higher score than one without, a tie counting half.

    None if all texts have the label, or none.
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return None
    # Mean ranks, so that ties count half (Mann-Whitney).
    _, inverse, counts = np.unique(chances, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks = (ends - counts + 1 + ends) / 2
    ranks = mean_ranks[inverse]
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_error(truth: np.ndarray, chances: np.ndarray) -> float | None:
    """Return the expected calibration error: the mean distance of predicted and observed frequencies in bins of equal width."""
    if not len(truth):
        return None
    bins = np.minimum((chances * BINS).astype(int), BINS - 1)
    total = 0.0
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            total += abs(float(chances[inside].mean()) - float(truth[inside].mean())) * int(inside.sum())
    return total / len(truth)


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _mean_of_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
