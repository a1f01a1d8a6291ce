"""The sections of classification and reward as they are written."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from moe_train import config


def read(labels: object) -> config.Classification:
    return config.Classification.model_validate_json(json.dumps({"name": "classification", "labels": labels}))


def test_a_list_is_a_target_with_one_label() -> None:
    section = read({"mood": ["good", "bad"], "topics": {"names": ["a", "b"], "several": True}})
    assert [(target.name, target.several) for target in section.targets] == [("mood", False), ("topics", True)]
    assert config.Classification.model_validate_json(section.model_dump_json()) == section
    assert config.Reward(name="reward").scores.output_names == ("reward",)


@pytest.mark.parametrize("labels", [{}, {"mood": ["good"]}, {"mood": ["good", "good"]}, {"mood": ["good", ""]}])
def test_labels_that_decide_nothing(labels: object) -> None:
    with pytest.raises(ValidationError):
        read(labels)
