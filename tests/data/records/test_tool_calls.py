"""Calls of every spelling become OpenAI's, with arguments that are the JSON text of one object."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.records.problem import Problem
from moe_train.data.records.tool_calls import CallIds, arguments_text
from tests.data.records.reading import ANSWER, CALL, CALLING, RESULT, TOOL, USER, conversation, problem

ARGUMENTS = {"port": "Brest"}
LEGACY = {"name": "get_tide", "arguments": json.dumps(ARGUMENTS)}
CALLS: list[dict[str, Any]] = [
    CALLING,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    {"role": "assistant", "tool_calls": [json.dumps(CALL)]},
    {"role": "assistant", "tool_calls": [{"id": "call00000", "name": "get_tide", "arguments": ARGUMENTS}]},
    {"role": "assistant", "tool_calls": [{"id": "call00000", "function": {"name": "get_tide", "parameters": ARGUMENTS}}]},
    {"role": "assistant", "tool_calls": [{"id": "call00000", "type": "tool_call", "name": "get_tide", "args": ARGUMENTS}]},
    {"role": "assistant", "function_call": LEGACY},
    {"role": "assistant", "content": None, "function_call": {"name": "get_tide", "arguments": ARGUMENTS}},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "call00000", "name": "get_tide", "input": ARGUMENTS}]},
    {"from": "function_call", "value": json.dumps({"name": "get_tide", "arguments": ARGUMENTS})},
    {"from": "function_call", "value": json.dumps([{"name": "get_tide", "parameters": ARGUMENTS}])},
]
RESULTS: list[dict[str, Any]] = [
    RESULT,
    {"role": "function", "name": "get_tide", "content": "4.2"},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call00000", "content": "4.2"}]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "call00000", "content": [{"type": "text", "text": "4.2"}]}],
    },
    {"from": "observation", "value": "4.2"},
    {"from": "tool", "value": "4.2"},
]


@pytest.mark.parametrize("calling", CALLS)
@pytest.mark.parametrize("result", RESULTS)
def test_every_spelling(calling: dict[str, Any], result: dict[str, Any]) -> None:
    read = conversation({"messages": [USER, calling, result, ANSWER], "tools": [TOOL]}).messages
    assert read == [USER, CALLING, read[2], ANSWER] and read[2] | {"name": "x"} == RESULT | {"name": "x"}


@pytest.mark.parametrize(
    "arguments",
    [
        '"{\\"port\\": \\"Brest\\"}"', "null", '["Brest"]', "3", '{"x": NaN}', '{"x": Infinity}', '{"x": 1e999}', "", "port=Brest",
        '{"a": 1, "a": 2}', '{"a": 1} {"b": 2}', "{'a': 1}", None, 3, ["Brest"], True, {"x": float("nan")}, {"x": {1, 2}},
    ],
)  # fmt: skip
def test_arguments_that_are_no_object(arguments: object) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert problem({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).rule == "arguments"


@pytest.mark.parametrize("arguments", [{"a": "\ud800"}, {"\udc00": 1}, '{"a": "\\ud800"}', '{"\\uDC00": [1]}'])
def test_half_a_surrogate_pair_in_arguments_escaped_or_not(arguments: object) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert problem({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).rule == "unicode"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "f"}, "without arguments"),
        ({"name": "f", "arguments": {}, "parameters": {"a": 1}}, "both arguments and parameters"),
        ({"arguments": {}}, "has no name"),
        ({"function": None, "type": "function"}, "has no name"),
        ({"function": "f"}, "should have id and function"),
        ({"type": "custom", "custom": {"name": "f", "input": "x"}}, "of type 'custom'"),
        (3, "which is no call"),
        ("f()", "which is no call"),
    ],
)
def test_what_is_no_call(call: object, said: str) -> None:
    assert said in problem({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).message


def test_both_spellings_of_calls_at_once() -> None:
    message = {"role": "assistant", "tool_calls": [CALL], "function_call": LEGACY}
    assert "both tool_calls and function_call" in problem({"messages": [USER, message]}).message


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_an_object_and_its_text_are_the_same(value: dict[str, Any]) -> None:
    assert json.loads(arguments_text(value, "it")) == json.loads(arguments_text(json.dumps(value), "it")) == value


@given(JSON.filter(lambda value: not isinstance(value, dict)))
def test_nothing_else_is_an_object(value: object) -> None:
    for written in (value, json.dumps(value), json.dumps(json.dumps({"a": value}))):
        with pytest.raises(Problem):
            arguments_text(written, "it")


def test_results_answer_the_calls_in_their_order_or_by_name() -> None:
    ids = CallIds()
    calls = ids.numbered([{"function": {"name": "f"}}, {"function": {"name": "g"}}])
    ids.add({"role": "assistant", "tool_calls": calls})
    assert [call["id"] for call in calls] == ["call00000", "call00001"]
    assert ids.unanswered() == "call00000" and ids.unanswered("g") == "call00001" and ids.unanswered("h") is None
    ids.add({"role": "tool", "tool_call_id": "call00000"})
    assert ids.unanswered() == "call00001"
