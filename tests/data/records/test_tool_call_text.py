"""Calls in tags are read where a record is clearly of that form, and otherwise stay text or are a problem."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.records.reading import ANSWER, CALL, CALLING, RESULT, TOOL, USER, conversation, problem, reading

TEXT = '<tool_call>\n{"name": "get_tide", "arguments": {"port": "Brest"}}\n</tool_call>'
CALLED = {"role": "assistant", "content": TEXT}
ANSWERED = {"role": "tool", "content": "<tool_response>\n4.2\n</tool_response>"}


def test_hermes_calls_and_results() -> None:
    record = {"messages": [USER, CALLED, ANSWERED, ANSWER], "tools": [TOOL]}
    assert conversation(record).messages == [USER, CALLING, RESULT, ANSWER]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "Look. " + TEXT}, {"from": "tool", "value": "4.2"}]
    read = conversation({"conversations": [*sharegpt, {"from": "gpt", "value": "b"}], "tools": [TOOL]}).messages
    assert read[1] == {"role": "assistant", "content": "Look.", "tool_calls": [CALL]} and read[2] == RESULT


def test_two_calls_and_two_results_in_one_message() -> None:
    two = {"role": "assistant", "content": f"{TEXT}\n{TEXT}", "weight": 0}
    results = {"role": "tool", "content": ANSWERED["content"].replace("4.2", "1") + "\n" + ANSWERED["content"]}
    read = conversation({"messages": [USER, two, results, ANSWER], "tools": [TOOL]}).messages
    assert [call["id"] for call in read[1]["tool_calls"]] == ["call00000", "call00001"] and read[1]["weight"] == 0
    assert [(m["content"], m["tool_call_id"]) for m in read[2:4]] == [("1", "call00000"), ("4.2", "call00001")]


def test_without_tools_it_stays_text() -> None:
    assert conversation({"messages": [USER, CALLED]}).messages == [USER, CALLED]
    assert conversation({"messages": [USER | {"content": TEXT}, ANSWER], "tools": [TOOL]}).messages[0]["content"] == TEXT


@pytest.mark.parametrize(
    "mark",
    [
        *(
            "<functioncall>",
            "<function_call>",
            "<|tool_call|>",
            "<TOOL_CALLS>",
            "<function=f>",
            "<|python_tag|>",
            "<function_calls>",
        ),
        *(
            "<｜tool▁calls▁begin｜>",
            "<|tool_calls_section_begin|>",
            "<minimax:tool_call>",
            "<start_function_call>",
            '<invoke name="f">',
        ),
    ],
)
def test_a_call_in_the_form_of_another_model_is_refused_beside_tools(mark: str) -> None:
    called = {"role": "assistant", "content": f'{mark} {{"name": "f"}}'}
    fields = {"messages": [USER, called], "tools": [TOOL]}
    refused = problem(fields)
    assert refused.rule == "call-text" and "--ignore tools" in refused.remedy
    assert reading(fields, ignore=("tools",)).record.messages == [USER, called]  # type: ignore[union-attr]
    asked = USER | {"content": f"What does {called['content']} mean?"}
    assert conversation({"messages": [asked, called], "tools": [TOOL]}).messages == [asked, called]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_tide", "parameters": {"port": "Brest"}}',
        '```json\n[{"name": "get_tide", "arguments": {}}]\n```',
        '[get_tide(port="Brest")]',
        "get_tide(port='Brest')\n",
        'Thought: I look.\nAction: get_tide\nAction Input: {"port": "Brest"}',
    ],
)
def test_a_text_that_is_nothing_but_a_call_of_a_tool(text: str) -> None:
    called = {"role": "assistant", "content": text}
    assert "is a call of get_tide as text" in problem({"messages": [USER, called], "tools": [TOOL]}).message
    assert conversation({"messages": [USER, called]}).messages == [USER, called]
    other = {"role": "assistant", "content": text.replace("get_tide", "get_wind")}
    assert conversation({"messages": [USER, other], "tools": [TOOL]}).messages == [USER, other]


@pytest.mark.parametrize(
    "text", ['{"name": "get_tide"}', "{not JSON", "[]", "[1]", "I would call get_tide(port='Brest') here.", "Action: get_tide"]
)
def test_an_answer_about_a_tool_is_no_call(text: str) -> None:
    answer = {"role": "assistant", "content": text}
    assert conversation({"messages": [USER, answer], "tools": [TOOL]}).messages == [USER, answer]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"}],
        [USER, {"role": "assistant", "content": TEXT + " Done."}],
        [USER, {"role": "assistant", "content": "<tool_call>{}"}],
        [{"role": "system", "content": "Use <tools>[]</tools>"}, USER, CALLED],
    ],
)
def test_what_is_only_nearly_of_that_form_is_a_problem(messages: list[dict[str, Any]]) -> None:
    assert problem({"messages": messages, "tools": [TOOL]}).rule in ("call-text", "arguments")
