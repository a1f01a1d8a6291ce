"""Tool calls in a model's answer, in the forms that chat formats give them, and their equality with expected calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_train.data.records.json_parser import parse_strictly
from moe_train.data.records.tool_calls import read_calls
from moe_train.data.records.unread import Unread
from moe_train.evaluate.suites import json_values


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: dict[str, Any]
    """The arguments as JSON values."""


def calls_of(value: object) -> tuple[Call, ...]:
    """Return the calls in a list of calls, a single call, or the JSON text of either, in any spelling of records.

    Raises:
        ValueError: The value is no such thing.
    """
    if isinstance(value, dict) and "tool_calls" in value:
        value = value["tool_calls"]  # a message of the assistant
    functions = [call["function"] for call in read_calls(value, "the answer", Unread())]
    return tuple(Call(function["name"], parse_strictly(function["arguments"])) for function in functions)


_MARKED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_OPENING = "<tool_call>"
_MARK = "[TOOL_CALLS]"
_NAME_AND_ARGUMENTS = re.compile(r"\s*(?P<name>[^\[\]{}\s]+?)\s*(?:\[CALL_ID\][^\[{]*)?\[ARGS\](?P<arguments>.*)", re.DOTALL)


def find_calls(text: str) -> tuple[Call, ...]:
    """Return the calls that an answer makes, given its text with control tokens written by name.

    Read are Mistral's forms (`[TOOL_CALLS] [{…}]`, and `[TOOL_CALLS]name[ARGS]{…}` for each call), Hermes'
    (`<tool_call>{…}</tool_call>`), and an answer that is nothing but a call or a list of calls in JSON. Other text holds no calls.

    Raises:
        ValueError: The answer has a mark of a call, and what follows it is no call.
    """
    if has_mark(text):
        return split_answer(text).calls
    try:
        value = parse_strictly(text)
    except ValueError:
        return ()
    is_call = isinstance(value, dict) and "name" in value
    is_list_of_calls = isinstance(value, list) and bool(value) and all(isinstance(x, dict) and "name" in x for x in value)
    return calls_of(value) if is_call or is_list_of_calls else ()


class SplitAnswer(NamedTuple):
    """The parts of an answer with marked calls."""

    content: str
    """The text before the first call."""
    calls: tuple[Call, ...]
    rest: str
    """The text between and behind the calls, control tokens by name included."""


def has_mark(text: str) -> bool:
    """Return whether an answer, with control tokens written by name, has a mark of a call."""
    return _MARK in text or _OPENING in text


def split_answer(text: str) -> SplitAnswer:
    """Split an answer with marked calls, given its text with control tokens written by name.

    Raises:
        ValueError: What follows a mark is no call.
    """
    if _MARK in text:
        content, *parts = text.split(_MARK)
        return _mistral_calls(content, parts)
    content = text[: text.index(_OPENING)]
    marked = _MARKED.findall(text)
    if len(marked) != text.count(_OPENING):
        raise ValueError(f"a {_OPENING} does not end")
    calls = tuple(call for part in marked for call in calls_of(part))
    return SplitAnswer(content, calls, _MARKED.sub("", text[len(content) :]))


def _mistral_calls(content: str, parts: Sequence[str]) -> SplitAnswer:
    """Read the calls that follow each [TOOL_CALLS]: a list in JSON, or a name and arguments."""
    calls: list[Call] = []
    rest = ""
    for part in parts:
        match = _NAME_AND_ARGUMENTS.fullmatch(part)
        written = (part if match is None else match["arguments"]).strip()
        # The value ends before a control token, such as the end of the answer.
        value, end = json.JSONDecoder().raw_decode(written)
        rest += written[end:]
        if match is None:
            calls += calls_of(json.dumps(value))
        else:
            calls += calls_of({"name": match["name"], "arguments": value})
    return SplitAnswer(content, tuple(calls), rest)


def same_calls(made: Sequence[Call], expected: Sequence[Call], any_order: bool) -> bool:
    """Return whether two lists of calls are equal: functions by name, arguments as JSON values.

    Args:
        made: The calls of an answer.
        expected: The calls that it should make.
        any_order: Whether the order of the calls does not count.
    """
    if len(made) != len(expected):
        return False
    if not any_order:
        return all(_is_same(a, b) for a, b in zip(made, expected, strict=True))
    # Equality is transitive, so any equal call may be taken for the next one.
    remaining = list(expected)
    for call in made:
        match = next((i for i, candidate in enumerate(remaining) if _is_same(call, candidate)), None)
        if match is None:
            return False
        del remaining[match]
    return True


def _is_same(first: Call, second: Call) -> bool:
    return first.name == second.name and json_values.equal(first.arguments, second.arguments)
