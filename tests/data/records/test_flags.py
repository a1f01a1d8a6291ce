"""What trainers call `weight`: one meaning in all spellings, and never a guess."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.records.flags import common_flag, take_flag
from moe_train.data.records.problem import Problem
from tests.data.records.reading import ANSWER, USER, conversation, problem

SPELLINGS: list[tuple[str, Any, int]] = [
    *[(name, value, 0) for name in ("weight", "train", "training", "loss", "loss_weight") for value in (False, 0, 0.0, "false")],
    *[(name, value, 1) for name in ("weight", "train", "training", "loss", "loss_weight") for value in (True, 1, 1.0, "1")],
]


@pytest.mark.parametrize(("name", "value", "weight"), SPELLINGS)
def test_every_spelling_is_a_weight(name: str, value: object, weight: int) -> None:
    said = ANSWER | {"weight": weight}
    assert conversation({"messages": [USER, ANSWER | {name: value}]}).messages == [USER, said]
    sharegpt = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"], name: value}]
    assert conversation({"conversations": sharegpt}).messages == [USER, said]
    part = {"type": "text", "text": ANSWER["content"], name: value}
    assert conversation({"messages": [USER, ANSWER | {"content": [part]}]}).messages == [USER, said]


@pytest.mark.parametrize(
    "flags",
    [
        {"weight": 0.5}, {"loss_weight": 0.3}, {"weight": 2}, {"train": "perhaps"}, {"loss": [1]}, {"weight": -1},
        {"train": True, "loss": False}, {"weight": 0, "train": True}, {"loss_weight": float("nan")},
    ],
)  # fmt: skip
def test_what_is_neither_or_both_is_a_problem(flags: dict[str, Any]) -> None:
    assert problem({"messages": [USER, ANSWER | flags]}).rule == "weight"


def test_only_the_assistant_is_trained_on() -> None:
    assert (
        conversation({"messages": [USER | {"weight": 1}, ANSWER, USER | {"train": False}, ANSWER]}).messages == [USER, ANSWER] * 2
    )
    assert "only the assistant" in problem({"messages": [USER | {"train": True}, ANSWER]}).message
    assert "only the assistant" in problem({"conversations": [{"from": "human", "value": "a", "loss": True}]}).message


def test_parts_with_different_flags_are_a_problem() -> None:
    parts = [{"type": "text", "text": "Perhaps 5.", "train": False}, {"type": "text", "text": "4", "train": True}]
    assert problem({"messages": [USER, ANSWER | {"content": parts}]}).rule == "weight"
    same = [part | {"train": False} for part in parts]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Perhaps 5."}, {"type": "text", "text": "4"}], "weight": 0}
    assert conversation({"messages": [USER, ANSWER | {"content": same}]}).messages[1] == said
    assert problem({"messages": [USER, ANSWER | {"content": same, "train": True}]}).rule == "weight"


def test_parts_without_a_flag_have_that_of_the_message() -> None:
    assert common_flag("m", None, [None, None]) is None
    assert common_flag("m", 0, [None]) == 0
    assert common_flag("m", None, [1, None]) == 1
    with pytest.raises(Problem):
        common_flag("m", None, [0, None])


def test_flags_are_taken_out() -> None:
    left = {"train": 0, "other": 1}
    assert take_flag(left, "m", "assistant") == 0 and left == {"other": 1}
