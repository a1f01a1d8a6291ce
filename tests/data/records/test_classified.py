"""Records with labels, in the forms of Mistral's Classifier Factory."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import read
from moe_train.data.records.normal_form import ClassifiedText, Conversation

MOOD = config.ScoreTarget(name="mood", labels=("good", "bad"))
TOPICS = config.ScoreTarget(name="topics", labels=("a", "b", "c"), several=True)
ONE = config.ClassificationRecord(name="classification", targets=(TOPICS,))
BOTH = config.ClassificationRecord(name="classification", targets=(MOOD, TOPICS))


def labels(record: config.Record, fields: dict[str, Any]) -> tuple[float, ...]:
    normal = read({"text": "t", **fields}, record).record
    assert isinstance(normal, ClassifiedText)
    return normal.labels


def test_forms_of_labels() -> None:
    assert labels(BOTH, {"labels": {"mood": "bad", "topics": ["c", "a"]}}) == (0, 1, 1, 0, 1)
    assert labels(BOTH, {"labels": '{"topics": [], "mood": ["good"]}'}) == (1, 0, 0, 0, 0)
    assert labels(ONE, {"labels": ["b"]}) == labels(ONE, {"labels": "b"}) == (0, 1, 0)
    unknown = labels(BOTH, {"labels": {"mood": None, "topics": "a"}})
    assert math.isnan(unknown[0]) and math.isnan(unknown[1]) and unknown[2:] == (1, 0, 0)


def test_conversations() -> None:
    fields = {"messages": [{"role": "user", "content": "hello"}], "labels": {"topics": ["a"]}}
    normal = read(fields, ONE).record
    assert isinstance(normal, ClassifiedText) and isinstance(normal.content, Conversation)
    assert read({**fields, "extra": 1}, ONE).unread == ("extra",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the record has no labels"),
        ({"labels": {"mood": "good"}}, "labels has no target 'topics'"),
        ({"labels": {"mood": "good", "topics": [], "tone": "x"}}, "labels has the target 'tone'; the targets are mood, topics"),
        ({"labels": {"mood": "fine", "topics": []}}, "target 'mood' has the label 'fine'; its labels are good, bad"),
        ({"labels": {"mood": ["good", "bad"], "topics": []}}, "target 'mood' has 2 labels"),
        ({"labels": {"mood": [], "topics": []}}, "target 'mood' has 0 labels"),
        ({"labels": {"mood": "good", "topics": ["a", "a"]}}, "target 'topics' has a label twice"),
        ({"labels": {"mood": None, "topics": None}}, "all targets are null"),
        ({"labels": "good"}, "labels should be an object with a key for each target"),
        ({"labels": {"mood": "good", "topics": []}, "messages": [{"role": "user", "content": "x"}]}, "both text and messages"),
    ],
)
def test_bad_labels(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(BOTH, fields)
