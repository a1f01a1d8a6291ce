"""Lists of messages: as lists and as JSON text, with other keys, and what they are refused for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.unread import Unread
from tests.data.records.reading import ANSWER, CALL, CALLING, RESULT, TOOL, USER, conversation, problem, reading

MESSAGES = [USER, CALLING, RESULT, ANSWER]


@pytest.mark.parametrize("column", ["messages", "interactions", "conversations", "conversation"])
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
    ("speaker", "role"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("developer", "system"), ("ipython", "tool"), ("Bob", "Bob")],
)
def test_names_of_roles_in_every_spelling_of_a_message(speaker: str, role: str) -> None:
    for who in ("role", "from"):
        for says in ("content", "value"):
            assert conversation({"messages": [{who: speaker, says: "a"}]}).messages == [{"role": role, "content": "a"}]
    assert conversation({"messages": [{"role": speaker, "from": role, "value": "a", "content": "a"}]}).messages[0]["role"] == role
    renamed = config.ChatRecord(name="chat", roles={speaker: "tool"})
    assert read_messages([{"role": speaker, "content": "a"}], "messages", renamed, Unread())[0]["role"] == "tool"


CALL_TEXT = '{"name": "get_tide", "arguments": {"port": "Brest"}}'


@pytest.mark.parametrize("who", ["role", "from"])
@pytest.mark.parametrize(("calling", "answering"), [("function_call", "observation"), ("tool_call", "tool_response")])
def test_a_call_as_a_message_of_its_own(who: str, calling: str, answering: str) -> None:
    written = [USER, {who: calling, "content": CALL_TEXT}, {who: answering, "content": "4.2"}, ANSWER]
    assert conversation({"messages": written, "tools": [TOOL]}).messages == [USER, CALLING, RESULT, ANSWER]


def test_parallel_calls_as_messages_of_their_own_are_one_turn() -> None:
    calls: list[dict[str, Any]] = [{"role": "tool_call", "content": CALL_TEXT}] * 2
    results = [{"role": "tool_response", "content": "4.2"}, {"role": "tool_response", "content": "5.1"}]
    second = CALL | {"id": "call00001"}
    assert conversation({"messages": [USER, *calls, *results, ANSWER]}).messages == [
        USER,
        {"role": "assistant", "tool_calls": [CALL, second]},
        RESULT,
        {"role": "tool", "content": "5.1", "tool_call_id": "call00001"},
        ANSWER,
    ]
    apart = conversation({"messages": [USER, calls[0], calls[1] | {"loss": False}, *results, ANSWER]}).messages
    assert [message.get("weight") for message in apart[1:3]] == [None, 0]


def test_calls_in_parts_without_ids_are_numbered() -> None:
    parts = [{"type": "tool_calls", "value": CALL_TEXT}]
    result = {"role": "tool", "content": [{"type": "text", "value": "4.2"}]}
    written = [USER, {"role": "assistant", "content": parts}, result, ANSWER]
    assert conversation({"messages": written}).messages == [USER, CALLING, RESULT, ANSWER]


def test_a_result_without_an_id_is_not_given_that_of_a_call_which_has_its_own() -> None:
    written = [USER, CALLING, {"role": "tool", "content": "4.2"}, ANSWER]
    assert conversation({"messages": written}).messages == written


@pytest.mark.parametrize("none", [[], "", "[]", "null", None])
def test_no_calls_in_every_spelling(none: object) -> None:
    fields = {"messages": [USER, ANSWER | {"tool_calls": none}], "tools": none}
    assert conversation(fields).messages == [USER, ANSWER]


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
        ([USER, {"role": "assistant", "text": "a"}], "message 1 has no content; it has 'text'"),
        ([USER, {"role": "assistant", "content": None, "refusal": "No."}], "has the key 'refusal'"),
        ([USER, {"speaker": "bot", "body": "a"}], "message 1 has no role and no content; it has"),
        ({"role": ["user"], "content": []}, "should be a list"),
        ({"role": "user", "content": "a"}, "should be a list"),
        ([{"role": "assistant", "tool_calls": 3}], "should be a list"),
        ([{"role": "assistant", "tool_calls": {"id": "a"}}], "has no name"),
        ([{"role": "tool_call", "content": "get_tide()"}], "not JSON"),
    ],
)
def test_what_is_no_list_of_messages(messages: object, said: str) -> None:
    assert said in problem({"messages": messages}, PLAIN).message


def test_the_remedy_for_another_key_of_the_text_works() -> None:
    fields = {"messages": [{"who": "user", "said": "a"}, {"who": "assistant", "said": "b"}]}
    assert "role: KEY and content: KEY" in problem(fields).remedy
    normal = reading(fields, config.ChatRecord(name="chat", role="who", content="said")).record
    assert [message["content"] for message in normal.messages] == ["a", "b"]  # type: ignore[union-attr]


def test_columns_of_messages_as_datasets_stores_a_sequence() -> None:
    columns = {key: [USER[key], ANSWER[key]] for key in USER}
    assert conversation({"messages": columns}).messages == [USER, ANSWER]
    shared = {"from": ["human", "gpt"], "value": [USER["content"], ANSWER["content"]]}
    assert conversation({"conversations": shared}).messages == [USER, ANSWER]


def test_texts_under_the_names_of_those_who_say_them() -> None:
    expected = [{"role": "system", "content": "S"}, USER, ANSWER]
    pair = {"human": USER["content"], "assistant": ANSWER["content"]}
    assert conversation({"system": "S", "conversation": [pair]}).messages == expected
    swapped = {"assistant": pair["assistant"], "human": pair["human"], "system": "S"}
    assert conversation({"conversation": [swapped]}).messages == expected
    xtuner = {"system": "S", "input": pair["human"], "output": pair["assistant"]}
    assert conversation({"conversation": [xtuner]}).messages == expected
    assert conversation({"messages": [{"user": pair["human"]}, {"assistant": pair["assistant"]}]}).messages == expected[1:]
    # With one entry of another kind nothing is guessed.
    assert "message 0 has no role and no content; it has 'user'" in problem({"messages": [{"user": "a"}, ANSWER]}).message
