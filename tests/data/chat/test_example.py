"""The assistant's turns, whether a cut example still bears loss, and which conversations use tools."""

from __future__ import annotations

import pytest

from moe_train.data.chat.example import Turn, has_trained_token, turns, uses_tools, without_tools
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
RESULT = {"role": "tool", "content": "c"}


def test_consecutive_messages_of_the_assistant_are_one_turn() -> None:
    silent = ANSWER | {"weight": 0}
    assert turns([USER, ANSWER, ANSWER, USER, silent, RESULT, ANSWER]) == [Turn(1, 3, True), Turn(4, 5, False), Turn(6, 7, True)]
    with pytest.raises(Problem, match="messages 1 and 2 are one turn of the assistant, and differ in weight"):
        turns([USER, ANSWER, silent])


@pytest.mark.parametrize(
    ("loss_mask", "seq_len", "expected"),
    [(None, 1, True), ([True, False, False, True], 3, True), ([True, False, False, True], 2, False)],
)
def test_an_example_that_is_cut_may_bear_no_loss(loss_mask: list[bool] | None, seq_len: int, expected: bool) -> None:
    assert has_trained_token(loss_mask, seq_len) == expected


def test_tools_calls_and_results_all_count_as_tools() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert uses_tools(Conversation([USER, ANSWER], [tool])) and uses_tools(Conversation([USER, RESULT, ANSWER], []))
    assert uses_tools(Conversation([USER, ANSWER | {"tool_calls": []}], []))
    assert not uses_tools(Conversation([USER, ANSWER], []))


def test_a_record_whose_tools_cannot_be_rendered_has_a_remedy() -> None:
    message = "the record has tools, and v1 has none; drop it"
    assert str(without_tools("v1 has none", "drop it")) == message
