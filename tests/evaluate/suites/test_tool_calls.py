"""Calls in answers: the forms of chat formats, and their equality."""

from __future__ import annotations

import pytest

from moe_train.evaluate.suites.tool_calls import Call, find_calls, same_calls

BREST = Call("port", {"name": "Brest"})
TIDE = Call("tide", {})


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "port", "arguments": {"name": "Brest"}, "id": "a1b2c3d4e"}, {"name": "tide", "arguments": {}}]</s>',
        '[TOOL_CALLS]port[ARGS]{"name": "Brest"}[TOOL_CALLS]tide[ARGS]{}</s>',
        '[TOOL_CALLS]port[CALL_ID]a1b2c3d4e[ARGS]{"name": "Brest"}[TOOL_CALLS]tide[CALL_ID]b1b2c3d4e[ARGS]{}',
        'I look.\n<tool_call>\n{"name": "port", "arguments": {"name": "Brest"}}\n</tool_call>\n'
        '<tool_call>{"name": "tide", "arguments": "{}"}</tool_call><|im_end|>',
        '[{"name": "port", "parameters": {"name": "Brest"}}, {"function": {"name": "tide", "arguments": {}}, "name": "tide"}]',
    ],
)
def test_forms(text: str) -> None:
    assert find_calls(text) == (BREST, TIDE)


@pytest.mark.parametrize("text", ["", "Brest", "[1, 2]", '{"port": "Brest"}', '"name"', "[]"])
def test_answers_without_calls(text: str) -> None:
    assert find_calls(text) == ()


@pytest.mark.parametrize(
    "text",
    ["[TOOL_CALLS]", "[TOOL_CALLS]port[ARGS]", '<tool_call>{"name": "port"', "<tool_call>port</tool_call>", '{"name": "port"}'],
)
def test_marks_without_a_call(text: str) -> None:
    with pytest.raises(ValueError):
        find_calls(text)


def test_order() -> None:
    assert same_calls((BREST, TIDE), (BREST, TIDE), any_order=False)
    assert not same_calls((TIDE, BREST), (BREST, TIDE), any_order=False)
    assert same_calls((TIDE, BREST), (BREST, TIDE), any_order=True)
    assert not same_calls((TIDE, TIDE), (BREST, TIDE), any_order=True)
    assert not same_calls((BREST,), (BREST, TIDE), any_order=True)
    assert not same_calls((Call("port", {"name": True}),), (Call("port", {"name": 1}),), any_order=True)
