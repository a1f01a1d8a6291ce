"""Read the items of a suite: a question, what a good answer is, and where the item comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.data.records.files import format_of, is_json_lines, read_file
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem, brief, checked_text, located
from moe_train.data.records.tools import take_tools
from moe_train.data.records.unread import Unread

_QUESTIONS = ("question", "prompt", "messages")
_ANSWERS = ("answer", "expected_output")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class SuiteItem(NamedTuple):
    """One item of a suite."""

    id: str
    """Unique in the suite: the item's own `id`, or its number, counted from 1."""
    location: str
    """File and line, for messages."""
    messages: list[Message]
    """The question in the normal form of a conversation; a question that is a text is a single turn of the user."""
    tools: list[dict[str, Any]]
    """The tools that the model is told of."""
    answers: tuple[str, ...]
    """Expected answers, any of which is right; () if the item states none."""
    choices: tuple[str, ...] = ()
    """The answers to choose from."""
    schema: Mapping[str, Any] | None = None
    """The JSON schema that the answer has to fit."""
    category: str | None = None
    """What kind of question it is, for results by category."""
    source: str | None = None
    """What the item was made from; items of one source are not independent."""


def read_items(file: Path, limit: int | None = None) -> list[SuiteItem]:
    """Read the items of a file, in any format that records can have.

    Mistral Studio's form, in which `expected_output` and `category` stand in `properties`, is read too.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An item cannot be read, has a key that is not read, or has the id of another item.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of items; its path is relative to the folder of the suite's file")
    kind = format_of(file)
    items: list[SuiteItem] = []
    places: dict[str, str] = {}
    for line, fields in read_file(file, kind, is_json_lines(file, kind), "question"):
        if limit is not None and len(items) == limit:
            break
        location = f"{file}:{line}"
        if isinstance(fields, Problem):
            raise ValueError(f"{location}: {fields}")
        item = located(location, _read_item, fields, len(items) + 1, location)
        if item.id in places:
            raise ValueError(f"{location}: id {item.id!r} is also that of {places[item.id]}; give each item an id of its own")
        places[item.id] = location
        items.append(item)
    if not items:
        raise ValueError(f"{file} has no items; write one record for each question")
    return items


def _read_item(fields: Mapping[str, Any], number: int, location: str) -> SuiteItem:
    """Read one record; the keys that are read are taken out of it, and any that remain are refused."""
    remaining = {key: value for key, value in fields.items() if value is not None}
    properties = remaining.pop("properties", {})
    if not isinstance(properties, dict):
        raise Problem("type", f"properties should be an object, not {brief(properties)}", "write its keys beside the question")
    if twice := sorted(remaining.keys() & properties.keys()):
        raise Problem("columns", f"{twice[0]} stands in the item and in its properties", "keep one of them")
    remaining |= properties
    unread = Unread()
    messages = _take_question(remaining, unread)
    tools = take_tools(remaining, unread)
    choices = _texts(remaining.pop("choices", ()), "choices")
    item = SuiteItem(
        id=str(remaining.pop("id", number)),
        location=location,
        messages=messages,
        tools=tools,
        answers=_take_answers(remaining, choices),
        choices=choices,
        schema=_take_schema(remaining),
        category=_take_text(remaining, "category"),
        source=_take_text(remaining, "source"),
    )
    remaining.pop("grading_guidance", None)  # for the people and models that judge answers by reading them
    unknown = [*map(repr, remaining), *map(repr, unread.names)]
    if unknown:
        known = "id, question, prompt, messages, tools, answer, expected_output, choices, schema, category, source, properties"
        raise Problem("columns", f"key {unknown[0]} is not read", f"remove it; an item has {known}")
    return item


def _take_question(remaining: dict[str, Any], unread: Unread) -> list[Message]:
    names = [name for name in _QUESTIONS if name in remaining]
    if len(names) != 1:
        stated = " and ".join(names) or "no question"
        raise Problem("columns", f"the item has {stated}", f"write one of {', '.join(_QUESTIONS)}")
    value = remaining.pop(names[0])
    if names[0] != "messages":
        return [{"role": "user", "content": checked_text(value, names[0])}]
    messages = read_messages(value, "messages", PLAIN, unread)
    if messages[-1].get("role") == "assistant":
        raise Problem("roles", "the last message is an assistant's, which the model is to write", "make it the expected answer")
    return messages


def _take_answers(remaining: dict[str, Any], choices: tuple[str, ...]) -> tuple[str, ...]:
    names = [name for name in _ANSWERS if name in remaining]
    if len(names) == 2:
        raise Problem("columns", "the item has answer and expected_output", "keep one of them")
    if not names:
        return ()
    value = remaining.pop(names[0])
    if choices:
        return (_choice(value, choices),)
    return _texts(value if isinstance(value, list | tuple) else [value], names[0])


def _choice(value: object, choices: tuple[str, ...]) -> str:
    """Return the expected choice, stated by its text, its letter (A is the first) or its index (0 is the first)."""
    if isinstance(value, str) and value in choices:
        return value
    index = -1
    if isinstance(value, int) and not isinstance(value, bool):
        index = value
    elif isinstance(value, str) and value.isdecimal():
        index = int(value)
    elif isinstance(value, str) and len(value) == 1:
        index = _LETTERS.find(value.upper())
    if not 0 <= index < len(choices):
        message = f"the answer {brief(value)} is none of the {len(choices)} choices"
        raise Problem("answer", message, "write the text, letter or index of a choice")
    return choices[index]


def _texts(values: object, name: str) -> tuple[str, ...]:
    """Return a list of texts; numbers and truth values are written as JSON writes them."""
    if not isinstance(values, list | tuple):
        raise Problem("type", f"{name} should be a list, not {brief(values)}", "write [first, second, …]")
    texts: list[str] = []
    for value in values:
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int | float):
            value = f"{value}"
        texts.append(checked_text(value, name))
    return tuple(texts)


def _take_text(remaining: dict[str, Any], key: str) -> str | None:
    value = remaining.pop(key, None)
    return None if value is None else checked_text(value, key)


def _take_schema(remaining: dict[str, Any]) -> Mapping[str, Any] | None:
    schema = remaining.pop("schema", None)
    if schema is not None and not isinstance(schema, dict):
        raise Problem("type", f"schema should be an object, not {brief(schema)}", "write the JSON schema itself")
    return schema
