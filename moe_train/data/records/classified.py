"""Records of classification: a text or a conversation with its labels, as in Mistral's Classifier Factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_train import config
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tools import json_value

_EXAMPLE = 'write {"labels": {"TARGET": "LABEL"}}, or a list of labels'


def take_labels(remaining: dict[str, Any], column: str, targets: Sequence[config.ScoreTarget]) -> tuple[float, ...]:
    """Take the labels out of a record, as 1 or 0 for each label of each target; NaN for all labels of a target that is null.

    Args:
        remaining: the columns of the record.
        column: the column of the labels: {target: label, list of labels, or null}; of a single target also the label alone.
        targets: the targets.

    Raises:
        Problem: labels are missing, unknown, or more than a target allows.
    """
    if remaining.get(column) is None:
        raise Problem("labels", f"the record has no {column}", _EXAMPLE)
    value = remaining.pop(column)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json_value(value, column, _EXAMPLE)
    if not isinstance(value, Mapping):
        if len(targets) > 1:
            raise Problem("labels", f"{column} should be an object with a key for each target, not {brief(value)}", _EXAMPLE)
        value = {targets[0].name: value}
    names = [target.name for target in targets]
    unknown = [name for name in value if name not in names]
    if unknown:
        raise Problem("labels", f"{column} has the target {unknown[0]!r}", f"the targets are {', '.join(names)}")
    flags: list[float] = []
    for target in targets:
        if target.name not in value:
            raise Problem("labels", f"{column} has no target {target.name!r}", "add it; null leaves it out of the loss")
        flags += _flags(value[target.name], target)
    # NaN is not equal to itself.
    if all(flag != flag for flag in flags):
        raise Problem("labels", "all targets are null, so the record teaches nothing", "drop the record")
    return tuple(flags)


def _flags(value: Any, target: config.ScoreTarget) -> list[float]:
    """Return 1 for each label that a text has, and 0 for the others."""
    if value is None:
        return [float("nan")] * len(target.labels)
    labels = list(value) if isinstance(value, list | tuple) else [value]
    for label in labels:
        if label not in target.labels:
            known = ", ".join(target.labels)
            raise Problem("labels", f"target {target.name!r} has the label {brief(label)}", f"its labels are {known}")
    if len(set(labels)) < len(labels):
        raise Problem("labels", f"target {target.name!r} has a label twice", "remove one")
    if not target.several and len(labels) != 1:
        raise Problem(
            "labels",
            f"target {target.name!r} has {len(labels)} labels, and each text has exactly one",
            "keep one, or set several: true for the target",
        )
    return [float(label in labels) for label in target.labels]
