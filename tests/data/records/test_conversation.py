"""Every spelling of a record becomes the one form."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import columns_to_load, normalise, text_column
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.records.recognise import recognise
from moe_train.data.records.write_back import denormalise

USER = {"role": "user", "content": "What is 2 + 3?"}
ASSISTANT = {"role": "assistant", "content": "5"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "call00000"}
CHAT = config.ChatRecord(name="chat")


def read(fields: dict[str, Any], record: config.Record | None = None) -> str | Conversation:
    return normalise(fields, record or recognise(fields))


@pytest.mark.parametrize("fields", [{"text": "a"}, {"content": "a", "id": 3}, {"text": "a", "content": None}])
def test_plain_text(fields: dict[str, Any]) -> None:
    assert read(fields) == "a"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER | {"weight": None}, ASSISTANT | {"tool_calls": None}], "tools": None},
        {"messages": [USER | {"content": [{"type": "text", "text": "What is 2 + 3?"}]}, ASSISTANT]},
        {"interactions": [USER, ASSISTANT], "available_tools": []},
        {"conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}], "id": "x"},
        {"prompt": "What is 2 + 3?", "completion": "5"},
        {"question": "What is 2 + 3?", "answer": "5"},
    ],
)
def test_one_question_in_every_spelling(fields: dict[str, Any]) -> None:
    assert read(fields) == Conversation([USER, ASSISTANT], [])


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, CALLING, RESULT, ASSISTANT], "tools": [TOOL]},
        {"messages": [USER, CALLING | {"content": ""}, RESULT, ASSISTANT], "tools": [TOOL["function"]]},
        {"messages": [USER, CALLING | {"content": None}, RESULT, ASSISTANT], "available_tools": json.dumps([TOOL])},
        {
            "interactions": [
                USER,
                {"role": "assistant", "tool_calls": [{"id": "call00000", "name": "add", "arguments": '{"a": 2}'}]},
                RESULT,
                ASSISTANT,
            ],
            "available_tools": [TOOL],
        },
        {
            "conversations": [
                {"from": "human", "value": "What is 2 + 3?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "5"},
            ],
            "tools": [TOOL],
        },
    ],
)
def test_one_call_in_every_spelling(fields: dict[str, Any]) -> None:
    assert read(fields) == Conversation([USER, CALLING, RESULT, ASSISTANT], [TOOL])


def test_a_system_text_in_its_own_column() -> None:
    fields = {"system_prompt": "Be brief.", "messages": [USER, ASSISTANT]}
    assert read(fields) == Conversation([{"role": "system", "content": "Be brief."}, USER, ASSISTANT], [])


def test_other_columns_by_a_mapping() -> None:
    fields = {"dialogue": [{"who": "client", "says": "What is 2 + 3?"}, {"who": "bot", "says": "5", "weight": 0}]}
    record = config.ChatRecord(
        name="chat", column="dialogue", role="who", content="says", roles={"client": "user", "bot": "assistant"}
    )
    assert read(fields, record) == Conversation([USER, ASSISTANT | {"weight": 0}], [])
    record_of_two = config.CompletionRecord(name="completion", prompt="q", completion="a")
    assert read({"q": "What is 2 + 3?", "a": "5"}, record_of_two) == Conversation([USER, ASSISTANT], [])


def test_a_conversation_as_prompt_bears_no_loss() -> None:
    fields = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert read(fields) == Conversation([USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT], [])


def test_a_record_of_another_kind_than_its_source_is_called_so() -> None:
    with pytest.raises(
        Problem, match=r"^the record is of the kind text \('text'\), and its source is read as chat; put each kind"
    ) as caught:
        normalise({"text": "a"}, CHAT)
    assert caught.value.rule == "mixed-kinds"
    with pytest.raises(Problem, match="no column 'messages'; the record has 'body'; name it with --map") as caught:
        normalise({"body": "a"}, CHAT)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("fields", "rule", "said"),
    [
        ({"text": "a", "content": "b"}, "text-and-content", "both text and content"),
        ({"body": "a"}, "columns", "the record has 'body'"),
        ({}, "columns", "no column"),
        ({"messages": []}, "type", "at least one message"),
        ({"messages": "[hello"}, "type", "is not JSON"),
        ({"messages": "hello"}, "type", "should be a list"),
        ({"messages": [USER, "hello"]}, "type", "message 1 should be an object"),
        ({"messages": [USER], "interactions": [USER]}, "columns", "both messages and interactions"),
        ({"messages": [USER], "tools": [TOOL], "available_tools": [TOOL, TOOL]}, "columns", "both tools"),
        ({"messages": [USER], "tools": "add"}, "type", "is not JSON"),
        ({"messages": [USER], "tools": {"name": "add"}}, "type", "tools should be a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "type", "should be a list"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "arguments", "is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[3]"}]}, "arguments", "is no call"),
        ({"prompt": "a", "completion": 3}, "type", "column 'completion' should be text"),
        ({"text": 3}, "type", "column 'text' should be text"),
    ],
)
def test_what_has_no_such_form(fields: dict[str, Any], rule: str, said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        read(fields)
    assert caught.value.rule == rule
    assert caught.value.remedy in str(caught.value)


def test_what_it_need_not_understand_passes() -> None:
    odd = [{"role": "narrator", "content": 3}, {"content": "who?"}, {"from": "alien", "value": None}]
    assert read({"messages": odd}) == Conversation([odd[0], odd[1], {"role": "alien"}], [])


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"messages": [USER, ASSISTANT], "id": 3}, {"messages": [USER, ASSISTANT], "id": 3}),
        (
            {"conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}], "id": 3},
            {"messages": [USER, ASSISTANT], "id": 3},
        ),
        (
            {"interactions": [USER, CALLING, RESULT, ASSISTANT], "available_tools": [TOOL], "system_prompt": "S"},
            {"messages": [{"role": "system", "content": "S"}, USER, CALLING, RESULT, ASSISTANT], "tools": [TOOL]},
        ),
        ({"question": "What is 2 + 3?", "answer": "5", "id": 3}, {"question": "What is 2 + 3?", "answer": "5", "id": 3}),
    ],
)
def test_written_back(fields: dict[str, Any], written: dict[str, Any]) -> None:
    record = recognise(fields)
    conversation = normalise(fields, record)
    assert isinstance(conversation, Conversation)
    assert denormalise(fields, conversation, record) == written
    assert read(written) == conversation


def test_the_columns_that_count() -> None:
    present = ["body", "text", "id", "label", "imagePath", "interactions", "conversations", "tools", "prompt", "completion"]
    refused = ["label", "imagePath", "tools"]
    assert columns_to_load(config.TextRecord(name="text", column="body"), present) == ["body", *refused]
    assert columns_to_load(config.TextRecord(name="text"), present) == ["text", *refused]
    assert columns_to_load(CHAT, present) == ["label", "imagePath", "interactions", "conversations", "tools"]
    assert columns_to_load(config.ChatRecord(name="chat", column="dialogue"), present) == refused
    assert columns_to_load(config.CompletionRecord(name="completion"), present) == [*refused, "prompt", "completion"]
    assert text_column(config.TextRecord(name="text", column="body")) == "body"
