"""Outputs of a head: their number and names."""

from __future__ import annotations

import pytest

from moe_train import config
from tests.tiny import MIXTRAL


def test_outputs_follow_the_targets() -> None:
    assert config.ScoreHead().num_outputs == 1 and config.ScoreHead().output_names == ("reward",)
    mood = config.ScoreTarget(name="mood", labels=("good", "bad"))
    topics = config.ScoreTarget(name="topics", labels=("a", "b", "c"), several=True)
    assert config.ScoreHead(targets=(mood,)).output_names == ("good", "bad")
    both = config.ScoreHead(targets=(mood, topics))
    assert both.num_outputs == 5 and both.output_names == ("mood/good", "mood/bad", "topics/a", "topics/b", "topics/c")
    assert both.has_several_choices and not config.ScoreHead(targets=(topics, topics)).has_several_choices


def test_a_saved_model_is_read_again() -> None:
    head = config.ScoreHead(targets=(config.ScoreTarget(name="mood", labels=("good", "bad")),))
    model = MIXTRAL.model_copy(update={"scores": head})
    assert config.Model.model_validate_json(model.model_dump_json()) == model


def test_a_label_has_one_place() -> None:
    with pytest.raises(ValueError, match="target mood names a label twice"):
        config.ScoreTarget(name="mood", labels=("good", "good"))
