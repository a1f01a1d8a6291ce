"""Lists of messages: as lists and as JSON text, with other keys, and what they are refused for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.unread import Unread
from tests.data.records.reading import ANSWER, CALLING, RESULT, TOOL, USER, conversation, problem, reading

MESSAGES = [USER, CALLING, RESULT, ANSWER]


@pytest.mark.parametrize("column", ["messages", "interactions", "conversations"])
def test_a_list_and_its_json_text_are_the_same(column: str) -> None:
    expected = conversation({"messages": MESSAGES, "tools": [TOOL]})
    for written in (MESSAGES, tuple(MESSAGES), json.dumps(MESSAGES)):
        assert conversation({column: written, "tools": json.dumps([TOOL])}) == expected


def test_the_name_of_a_function_is_kept_for_results_alone() -> None:
    normal, unread = reading(
        {"messages": [USER | {"name": "Ann"}, CALLING, RESULT | {"name": "get_tide"}, ANSWER], "tools": [TOOL]}
    )
    assert unread == ("messages.name",)
    assert normal.messages == [USER, CALLING, RESULT | {"name": "get_tide"}, ANSWER]  # type: ignore[union-attr]


def test_messages_with_other_keys() -> None:
    record = config.ChatRecord(name="chat", role="who", content="says", roles={"client": "user", "bot": "assistant"})
    written: list[dict[str, Any]] = [
        {"who": "client", "says": USER["content"]},
        {"who": "bot", "says": ANSWER["content"], "mood": 1},
    ]
    unread = Unread()
    assert read_messages(written, "messages", record, unread) == [USER, ANSWER]
    assert list(unread.names) == ["messages.mood"]


def test_an_empty_column_beside_the_messages() -> None:
    fields = {"messages": [USER, ANSWER | {"prefix": False}], "conversations": [], "interactions": ""}
    assert conversation(fields).messages == [USER, ANSWER]


def test_plain_messages_are_not_copied() -> None:
    assert read_messages([USER, ANSWER], "messages", PLAIN, Unread())[1] is ANSWER


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("[]", "at least one message"),
        ('[{"role": "user", "role": "system", "content": "a"}]', "stands twice"),
        ([USER | {"value": "Other?"}], "both content and value"),
        ([USER, ANSWER | {"prefix": True}], "has the key 'prefix'"),
        ([USER, {"role": "assistant", "content": "a", "refusal": "No."}], "has the key 'refusal'"),
        ([USER, None], "message 1 should be an object"),
        ([{"role": "assistant", "tool_calls": {"id": "a"}}], "tool_calls should be a list"),
    ],
)
def test_what_is_no_list_of_messages(messages: object, said: str) -> None:
    assert said in problem({"messages": messages}, PLAIN).message
