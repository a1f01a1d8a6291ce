"""Definitions of tools in every spelling: OpenAI's, Mistral's, Anthropic's, MCP's and bare functions."""

from __future__ import annotations

import json
from typing import Any

from moe_train.data.records.json_parser import parse_strictly
from moe_train.data.records.meaning import TOOL, TOOL_FUNCTION
from moe_train.data.records.problem import Problem, brief, checked_text
from moe_train.data.records.tool_calls import without_repeated
from moe_train.data.records.unread import Unread, is_empty

TOOL_COLUMNS = ("tools", "available_tools", "functions")
"""Columns of a record that may hold its tools."""
_SCHEMAS = ("parameters", "input_schema", "inputSchema", "arguments")
_FUNCTION = ("name", "description", "strict")
_REMEDY = 'write {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'


def take_tools(remaining: dict[str, Any], unread: Unread) -> list[dict[str, Any]]:
    """Take the tools out of a record, and convert them to the normal form; no tools are an empty list.

    Raises:
        Problem: If they cannot be interpreted, or stand in two columns.
    """
    present = {column: remaining.pop(column) for column in TOOL_COLUMNS if column in remaining}
    filled: dict[str, Any] = {}
    for column, stated in present.items():
        # Columnar files cannot store values of varying schema, so tools are JSON text there, null included.
        value = json_value(stated, column, "write a list of tools") if stated else stated
        # An empty column beside the one in use says nothing.
        if not is_empty(value):
            filled[column] = list(value) if isinstance(value, tuple) else value
    columns = list(filled)
    if not columns:
        return []
    if any(value != filled[columns[0]] for value in filled.values()):
        raise Problem("columns", f"the record has both {columns[0]} and {columns[1]}", "keep the one that is meant")
    value = filled[columns[0]]
    if not isinstance(value, list):
        raise Problem("type", f"{columns[0]} should be a list, not {brief(value)}", "write a list of tools")
    tools = [_tool(json_value(tool, f"tool {i}", _REMEDY), i, unread) for i, tool in enumerate(value)]
    for i, tool in enumerate(tools):
        _check_json(tool, f"tool {i}")
    return tools


def _check_json(tool: dict[str, Any], what: str) -> None:
    """Raise Problem for a tool that cannot be written as JSON, which is how every chat format writes it."""
    try:
        text = json.dumps(tool, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Problem("type", f"{what} has no form in JSON: {error}", "write values that JSON has") from None
    checked_text(text, what)


def json_value(value: Any, what: str, remedy: str) -> Any:
    """Return a value, or what it is as JSON text. Raises Problem for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_strictly(value)
    except ValueError as error:
        raise Problem("type", f"{what} of {brief(value)} is not JSON ({error})", remedy) from None


def _tool(tool: Any, i: int, unread: Unread) -> dict[str, Any]:
    """Convert one tool; the keys of a tool keep their order, which a template may write."""
    if not isinstance(tool, dict):
        raise Problem("type", f"tool {i} should be an object, not {brief(tool)}", _REMEDY)
    remaining = unread.opened(TOOL, tool)
    kind = remaining.pop("type", "function")
    if "function" not in remaining:
        # Anthropic writes "custom" for a tool that the caller defines; other types are built-in tools, without a schema.
        if kind not in ("function", "custom"):
            raise Problem("type", f"tool {i} is of type {brief(kind)}, and no function", "drop the record, or define a function")
        function = _function(remaining, i)
        unread.close(f"tool {i}", TOOL, remaining)
        return {"type": "function", "function": function}
    inner = remaining.pop("function")
    if kind != "function" or not isinstance(inner, dict):
        raise Problem("type", f"tool {i} should be a function, not {brief(tool)}", _REMEDY)
    unread.close(f"tool {i}", TOOL, without_repeated(remaining, inner))
    inner = unread.opened(TOOL_FUNCTION, inner)
    function = _function(inner, i)
    unread.close(f"tool {i}", TOOL_FUNCTION, inner)
    # Keeps the order of the two keys, since a template may dump a tool as JSON.
    normal = {key: function if key == "function" else "function" for key in tool if key in ("type", "function")}
    normal.setdefault("type", "function")
    return normal


def _function(remaining: dict[str, Any], i: int) -> dict[str, Any]:
    """Take a function out of an object: its name, description and schema."""
    name = remaining.get("name")
    if not isinstance(name, str):
        raise Problem("type", f"tool {i} is {brief(remaining)}, and has no name", _REMEDY)
    if not isinstance(remaining.get("description", ""), str):
        raise Problem("type", f"the description of tool {i} should be text, not {brief(remaining['description'])}", _REMEDY)
    schemas = [key for key in _SCHEMAS if key in remaining]
    if not schemas:
        message = f"tool {i} ({brief(name)}) has no parameters"
        raise Problem("type", message, 'write "parameters": {"type": "object", "properties": {}} if it takes none')
    # Equal schemas under two names are harmless.
    if any(remaining[key] != remaining[schemas[0]] for key in schemas):
        raise Problem("type", f"tool {i} has both {schemas[0]} and {schemas[1]}", "keep the one that is meant")
    function: dict[str, Any] = {}
    for key in list(remaining):
        if key in _FUNCTION:
            function[key] = remaining.pop(key)
        elif key in _SCHEMAS:
            schema = json_value(remaining.pop(key), f"the {key} of tool {i}", _REMEDY)
            if not isinstance(schema, dict):
                raise Problem("type", f"the {key} of tool {i} should be an object, not {brief(schema)}", "write a JSON schema")
            function["parameters"] = schema
    return function
