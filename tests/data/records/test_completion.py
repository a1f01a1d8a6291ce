"""Prompts and completions with everything that may stand beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.normal_form import Conversation, ModelSettings
from tests.data.records.reading import ANSWER, CALL, CALLING, SCHEMA, TOOL, USER, conversation, problem

SYSTEM = {"role": "system", "content": "Be brief."}
BOTH = [{"role": "user", "content": "Translate.\nthe sea"}, {"role": "assistant", "content": "la mer"}]
TURNS = [("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("query", "response"), ("prompt", "response")]


@pytest.mark.parametrize(("prompt", "completion"), TURNS)
@pytest.mark.parametrize("more", ["input", "context"])
def test_more_of_the_prompt_follows_it(prompt: str, completion: str, more: str) -> None:
    turns = {prompt: "Translate.", completion: "la mer"}
    assert conversation(turns | {more: "the sea"}).messages == BOTH
    assert conversation(turns | {more: ""}).messages == [{"role": "user", "content": "Translate."}, BOTH[1]]
    assert conversation({prompt: "", more: "the sea", completion: "la mer"}).messages[0]["content"] == "the sea"
    assert "should be text" in problem(turns | {more: ["the sea"]}).message


@pytest.mark.parametrize(("prompt", "completion"), TURNS)
@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_system_history_and_tools(prompt: str, completion: str, system: str) -> None:
    history = [["Hello", "Hi."], ["Bye", "Bye."]]
    turns = {prompt: USER["content"], completion: ANSWER["content"], system: "Be brief.", "tools": [TOOL]}
    before = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    for written in (history, json.dumps(history), [tuple(pair) for pair in history], before):
        assert conversation(turns | {"history": written}) == Conversation([SYSTEM, *before, USER, ANSWER], [TOOL])
    assert conversation(turns | {"history": []}).messages == [SYSTEM, USER, ANSWER]


def test_a_conversation_as_prompt_and_a_call_as_completion() -> None:
    for completion in ([CALLING], CALLING):
        fields = {"prompt": [USER], "completion": completion, "tools": [TOOL], "system": "Be brief."}
        assert conversation(fields) == Conversation([SYSTEM, USER, CALLING], [TOOL])
    assert conversation({"prompt": "How high is the tide?", "completion": [ANSWER]}).messages == [USER, ANSWER]
    texts = {"prompt": json.dumps([USER]), "completion": json.dumps(CALLING), "tools": json.dumps([TOOL])}
    assert conversation(texts) == Conversation([USER, CALLING], [TOOL])


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message", "system_instruction"])
@pytest.mark.parametrize("turns", [{"messages": [SYSTEM, USER, ANSWER]}, {"prompt": [SYSTEM, USER], "completion": [ANSWER]}])
def test_a_system_text_in_a_column_and_in_the_messages(column: str, turns: dict[str, Any]) -> None:
    assert conversation(turns | {column: "Be brief."}).messages == [SYSTEM, USER, ANSWER]
    refused = problem(turns | {column: "Be long."})
    assert refused.rule == "columns" and f"--ignore {column}" in refused.remedy


def test_an_answer_of_several_texts_is_no_answer() -> None:
    for fields in ({"question": "a", "answer": ["b", "c"]}, {"question": ["a"], "answer": "b"}, {"question": {}, "answer": "b"}):
        assert "should be text or messages" in problem(fields).message


def test_xlam_calls() -> None:
    calls = [{"name": "get_tide", "arguments": {"port": "Brest"}}]
    tools = [{"name": "get_tide", "description": "Tide at a port.", "parameters": SCHEMA}]
    expected = {"role": "assistant", "tool_calls": [{key: value for key, value in CALL.items() if key != "id"}]}
    for answers in (calls, json.dumps(calls)):
        read = conversation({"query": USER["content"], "answers": answers, "tools": json.dumps(tools)})
        assert read == Conversation([USER, expected], [TOOL])
    for answers in ("[]", "no call", []):
        assert problem({"query": "a", "answers": answers, "tools": tools}).rule in ("arguments", "type")


def test_json_is_an_answer_like_any_other_where_there_are_no_tools() -> None:
    text = '[{"name": "get_tide", "arguments": {}}]'
    assert conversation({"prompt": "a", "completion": text}).messages[1]["content"] == text
    assert conversation({"prompt": "a", "completion": '[{"a": 1}]', "tools": [TOOL]}).messages[1]["content"] == '[{"a": 1}]'


def test_settings() -> None:
    wanted = ModelSettings("high", {"type": "json_object"})
    settings: dict[str, Any] = {"reasoning_effort": "high", "response_format": '{"type": "json_object"}'}
    for fields in ({"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "b"}):
        assert conversation(fields | settings).settings == wanted
        assert "should be text" in problem(fields | {"reasoning_effort": 3}).message
        assert "should be an object" in problem(fields | {"response_format": [1]}).message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"history": [["only one"]]}, "pairs of texts"),
        ({"history": [["a", None]]}, "pairs of texts"),
        ({"history": [{"role": "user", "content": "a"}, ["b", "c"]]}, "pairs of texts"),
        ({"history": "a, b"}, "is not JSON"),
        ({"system": ["a"]}, "should be text"),
        ({"system": "a", "system_prompt": "b"}, "which differ"),
        ({"completion": 3}, "should be text"),
        ({"prompt": 3}, "should be text"),
        ({"completion": None, "answer": "b"}, "'completion' is null or empty"),
        ({"prompt": [USER], "context": "c"}, "has the key 'context'"),
        ({"documents": [{"text": "a"}]}, "has the key 'documents'"),
        ({"reasoning": "So."}, "has the key 'reasoning'"),
    ],
)
def test_what_is_refused(more: dict[str, Any], said: str) -> None:
    record = config.CompletionRecord(name="completion")
    assert said in problem({"prompt": "a", "completion": "b"} | more, record).message
