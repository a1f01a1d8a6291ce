"""Fields of a `config.json` that describe a head for classification or rewards: transformers' `...ForSequenceClassification`."""

from __future__ import annotations

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.weights.hf.config_keys import SCORING_ARCHITECTURES

_TARGETS = "score_targets"
"""Key, in the section `moe_train`, of the targets, which transformers has no field for."""
_DEFAULT_TARGET = "label"
"""Name of the target of files that name none."""


def class_name(model: config.Model) -> str:
    """Return the name of the class in transformers."""
    family = config.FAMILIES[model.family].hugging_face
    return family.architecture if model.scores is None else family.scoring_architecture


def write_scores(scores: config.ScoreHead) -> JsonObject:
    """Return the fields of a head."""
    names = scores.output_names
    problem = "single_label_classification"
    if not scores.targets:
        problem = "regression"
    elif all(target.several for target in scores.targets):
        problem = "multi_label_classification"
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": problem,
        "moe_train": {_TARGETS: [target.model_dump(mode="json") for target in scores.targets]},
    }


def read_scores(fields: JsonObject) -> JsonObject | None:
    """Return the section `scores` of a model; None for a class that predicts tokens.

    Raises:
        ValueError: the labels are not numbered 0, 1, 2, ….
    """
    architectures = fields.get("architectures")
    if not architectures or architectures[0] not in SCORING_ARCHITECTURES:
        return None
    own = fields.get("moe_train")
    if isinstance(own, dict) and _TARGETS in own:
        # Strict sections take tuples, where JSON has lists.
        return {"targets": tuple({**target, "labels": tuple(target["labels"])} for target in own[_TARGETS])}
    labels = fields.get("id2label")
    if labels is None:
        # transformers names labels so, and has two of them where no number is stated.
        labels = {str(index): f"LABEL_{index}" for index in range(fields.get("num_labels") or 2)}
    expected = [str(index) for index in range(len(labels))]
    if sorted(labels, key=str) != sorted(expected):
        raise ValueError(f"id2label has the keys {', '.join(map(str, labels))}; number the labels 0, 1, 2, …")
    if len(labels) == 1:
        return {"targets": ()}
    several = fields.get("problem_type") == "multi_label_classification"
    names = tuple(labels[key] for key in expected)
    return {"targets": ({"name": _DEFAULT_TARGET, "labels": names, "several": several},)}
