"""Tools of every spelling become OpenAI's, and none loses its schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.records.reading import ANSWER, FUNCTION, SCHEMA, TOOL, USER, conversation, problem, reading

NAMED = {"name": "get_tide", "description": "Tide at a port."}
SPELLINGS: list[dict[str, Any]] = [
    TOOL,
    {"function": FUNCTION},
    FUNCTION,
    {"type": "function", **FUNCTION},
    {"type": "custom", **NAMED, "input_schema": SCHEMA},
    NAMED | {"input_schema": SCHEMA},
    NAMED | {"inputSchema": SCHEMA},
    NAMED | {"arguments": SCHEMA},
    NAMED | {"parameters": json.dumps(SCHEMA)},
    {"type": "function", "function": NAMED | {"inputSchema": SCHEMA, "strict": None}},
]


@pytest.mark.parametrize("tool", SPELLINGS)
@pytest.mark.parametrize("column", ["tools", "available_tools", "functions"])
def test_every_spelling(tool: dict[str, Any], column: str) -> None:
    messages = [USER, ANSWER]
    for written in ([tool], (tool,), json.dumps([tool]), [json.dumps(tool)]):
        assert conversation({"messages": messages, column: written}).tools == [TOOL]
    assert conversation({"prompt": "a", "completion": "b", column: [tool]}).tools == [TOOL]


def test_keys_keep_their_order_and_strict_is_kept() -> None:
    function = {"strict": True, "parameters": SCHEMA, "name": "f", "description": "d"}
    (tool,) = conversation({"messages": [USER, ANSWER], "tools": [{"function": function, "type": "function"}]}).tools
    assert json.dumps(tool) == json.dumps({"function": function, "type": "function"})


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([NAMED], "has no parameters"),
        ([NAMED | {"parameters": None}], "has no parameters"),
        ([NAMED | {"parameters": 3}], "should be an object"),
        ([NAMED | {"parameters": "{"}], "is not JSON"),
        ([NAMED | {"parameters": {}, "input_schema": SCHEMA}], "both parameters and input_schema"),
        ([{"description": "d", "parameters": SCHEMA}], "has no name"),
        ([{"type": "web_search_20250305", "name": "web_search"}], "no function"),
        ([{"type": "function", "function": "get_tide"}], "should be a function"),
        (["get_tide"], "is not JSON"),
        ([3], "should be an object"),
        ({"name": "get_tide"}, "should be a list"),
        ('[{"name": "f", "parameters": {"a": 1, "a": 2}}]', "stands twice"),
        ([NAMED | {"parameters": {"a": "\ud800"}}], "half a surrogate pair"),
        ([NAMED | {"parameters": {"a": float("nan")}}], "no form in JSON"),
        (3, "should be a list"),
        (False, "should be a list"),
    ],
)
def test_what_is_no_tool(tools: object, said: str) -> None:
    assert said in problem({"messages": [USER, ANSWER], "tools": tools}).message


def test_xlam_names_parameters_as_they_are() -> None:
    """xLAM's parameters are no schema; they are written as they stand."""
    tool = {"name": "f", "description": "d", "parameters": {"port": {"type": "str", "description": "p"}}}
    assert reading({"messages": [USER, ANSWER], "tools": [tool]}).record.tools[0]["function"] == tool  # type: ignore[union-attr]
