"""What trainers call `weight`: one meaning in all spellings, and never a guess."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.records.flags import FlaggedPiece, loss_of, take_detail, take_flag
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem
from tests.data.records.reading import ANSWER, CALL, USER, conversation, problem

SPELLINGS: list[tuple[str, Any, int]] = [
    *[(name, value, 0) for name in ("weight", "train", "training", "loss", "loss_weight") for value in (False, 0, 0.0, "false")],
    *[(name, value, 1) for name in ("weight", "train", "training", "loss", "loss_weight") for value in (True, 1, 1.0, "1")],
]
GUESS = {"type": "text", "text": "Perhaps 5. "}
SURE = {"type": "text", "text": "4"}


def answer(**keys: object) -> Message:
    """The normal form of an answer with these keys."""
    return conversation({"messages": [USER, {"role": "assistant"} | keys]}).messages[1]


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
        {"train_detail": []}, {"train_detail": "0-3"}, {"train_detail": [{"begin_offset": 0, "end_offset": 1}]},
        {"train_detail": [{"begin_offset": 0, "end_offset": 9, "train": True}]},
        {"train_detail": [{"begin_offset": 3, "end_offset": 2, "train": True}]},
        {"train_detail": [{"begin_offset": 0, "end_offset": float("nan"), "train": True}]},
        {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": on} for on in (False, True)]},
        {"train": False, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
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
    detail = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    assert "only the assistant" in problem({"messages": [USER | {"train_detail": detail}, ANSWER]}).message


def test_texts_with_flags_are_pieces_of_one_text() -> None:
    pieces = [[("Perhaps 5. ", False), ("4", True)]]
    expected = {"role": "assistant", "content": "Perhaps 5. 4", "weight": 1, "pieces": pieces}
    for off, on in (({"train": False}, {"train": True}), ({"weight": 0}, {}), ({"loss_weight": 0.0}, {"loss_weight": 1.0})):
        assert answer(content=[GUESS | off, SURE | on]) == expected
    detail = [{"begin_offset": 11, "end_offset": 11, "train": True}]
    assert answer(content="Perhaps 5. 4", train_detail=detail) == expected
    assert (
        answer(content="Perhaps 5. 4", training_detail=[{"begin_offset": 0, "end_offset": 10, "train": False}, *detail]) == expected
    )
    same = [part | {"train": False} for part in (GUESS, SURE)]
    assert answer(content=same) == {"role": "assistant", "content": "Perhaps 5. 4", "weight": 0}
    assert problem({"messages": [USER, ANSWER | {"content": same, "train": True}]}).rule == "weight"


def test_reasoning_has_pieces_too() -> None:
    thought = {"type": "thinking", "thinking": "Two and two."}
    pieces = [[("Two and two.", False)], [("4", True)]]
    expected = {"role": "assistant", "content": [thought, SURE], "weight": 1, "pieces": pieces}
    assert answer(content=[thought | {"train": False}, SURE]) == expected
    field = [{"type": "text", "text": "Two and two.", "train": False}]
    assert answer(content="4", reasoning_content=field) == expected
    assert answer(content=[SURE | {"train": True}], reasoning_content=field) == expected
    # Only the flag of the answer: the reasoning is trained on as its message is.
    assert answer(content=[SURE | {"train": False}], thinking="Two and two.")["pieces"] == [
        [("Two and two.", True)],
        [("4", False)],
    ]


def test_a_call_is_trained_on_where_its_message_is() -> None:
    call = {"type": "tool_use", "id": "call00000", "name": "get_tide", "input": {"port": "Brest"}}
    read = answer(content=[GUESS | {"train": False}], tool_calls=[CALL])
    assert read["weight"] == 1 and read["pieces"] == [[("Perhaps 5. ", False)]] and read["tool_calls"] == [CALL]
    assert answer(content=[GUESS | {"train": False}, call])["pieces"] == read["pieces"]
    assert answer(content=[GUESS | {"train": False}, call | {"train": False}])["weight"] == 0
    assert "a call not" in problem({"messages": [USER, {"role": "assistant", "content": [GUESS, call | {"train": False}]}]}).message


def test_pieces_without_a_flag_have_that_of_the_message() -> None:
    def loss(whole: int | None, *flags: int | None) -> tuple[int | None, bool]:
        found = loss_of("m", whole, [[FlaggedPiece(str(i), flag) for i, flag in enumerate(flags)]], [])
        return found.flag, bool(found.pieces)

    assert loss(None, None, None) == (None, False)
    assert loss(0, None) == (0, False)
    assert loss(None, 1, None) == (1, False)
    assert loss(None, 0, None) == loss(1, 0, None) == (1, True)
    with pytest.raises(Problem):
        loss(0, 1, None)


def test_flags_are_taken_out() -> None:
    left = {"train": 0, "other": 1, "train_detail": [{"begin_offset": 1.0, "end_offset": 1.0, "train": "true"}]}
    assert take_flag(left, "m", "assistant") == 0
    assert take_detail(left, "m", "assistant", "abc") == [("a", 0), ("b", 1), ("c", 0)] and left == {"other": 1}
