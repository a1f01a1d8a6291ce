"""Fields of a config.json for a head that scores texts, ours and transformers' own."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.weights.hf.score_fields import class_name, read_scores, write_scores
from tests.tiny import MINISTRAL, MIXTRAL

TOPICS = config.ScoreTarget(name="topics", labels=("a", "b"), several=True)


@pytest.mark.parametrize(
    "head",
    [
        config.ScoreHead(),
        config.ScoreHead(targets=(TOPICS,)),
        config.ScoreHead(targets=(TOPICS, config.ScoreTarget(name="more", labels=("c", "d"), several=True))),
    ],
)
def test_what_is_written_is_read(head: config.ScoreHead) -> None:
    model = MIXTRAL.model_copy(update={"scores": head})
    assert class_name(model) == "MixtralForSequenceClassification" and class_name(MINISTRAL) == "MinistralForCausalLM"
    fields = {"architectures": [class_name(model)], **write_scores(head)}
    assert config.ScoreHead.model_validate(read_scores(fields)) == head
    assert read_scores({"architectures": ["MixtralForCausalLM"]}) is None


def test_files_of_transformers() -> None:
    classes = {"architectures": ["MistralForSequenceClassification"]}
    assert read_scores(classes) == {"targets": ({"name": "label", "labels": ("LABEL_0", "LABEL_1"), "several": False},)}
    several = {**classes, "id2label": {"0": "x", "1": "y", "2": "z"}, "problem_type": "multi_label_classification"}
    assert read_scores(several) == {"targets": ({"name": "label", "labels": ("x", "y", "z"), "several": True},)}
    assert read_scores({**classes, "id2label": {"0": "LABEL_0"}}) == {"targets": ()}
    with pytest.raises(ValueError, match="id2label has the keys 1, 2; number the labels"):
        read_scores({**classes, "id2label": {"1": "x", "2": "y"}})
