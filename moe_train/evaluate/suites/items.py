"""Read the items of a suite: a question, what a good answer is, and where the item comes from."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_train import config
from moe_train.data.records.files import format_of, is_json_lines, read_file
from moe_train.data.records.local_files import picture_folder
from moe_train.data.records.media import locate_media, with_columns
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Item, Problem, brief, checked_text, located
from moe_train.data.records.tools import take_tools
from moe_train.data.records.transcription import take_transcription
from moe_train.data.records.unread import Unread
from moe_train.evaluate.suites.tool_calls import Call, calls_of

_QUESTIONS = ("question", "prompt", "messages", "text")
_ANSWERS = ("answer", "expected_output")
AnswerKind = Literal["auto", "text", "letter", "index"]
"""How the answer of an item with choices names one of them: by its text, its letter (A is the first) or its index (from 0)."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class SuiteItem(NamedTuple):
    """One item of a suite."""

    id: str
    """Unique in the suite: the item's own `id`, or its number, counted from 1, after the file's name if there are several."""
    location: str
    """File and line, for messages."""
    messages: list[Message]
    """The question in the normal form of a conversation; a question that is a text is a single turn of the user. Empty for a
    text without a question.
    """
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
    tool_calls: tuple[Call, ...] | None = None
    """The calls that the answer should make; None if the item states none."""
    guidance: str | None = None
    """What a judge should look at."""


class ItemsFile(NamedTuple):
    """Location of the items of a suite, and how they are read."""

    pattern: Path
    """A file, or a pattern of several."""
    columns: config.Columns = config.Columns()
    """Other names of keys."""
    category_of_file: str | None = None
    """A regular expression whose first group, in a file's name, is the category of its items."""
    answers_are: AnswerKind = "auto"
    """How an answer names a choice."""
    stated_as: str = ""
    """The suite's file and key that name the files, for messages; empty if none does."""


def read_items(source: ItemsFile | Path, limit: int | None = None) -> list[SuiteItem]:
    """Read the items of files, in any format that records can have.

    Mistral Studio's form, in which `expected_output`, `category` and `grading_guidance` stand in `properties`, is read too.

    Args:
        source: The files.
        limit: The most items to take from the start, of each category where files name the categories; None for all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An item cannot be read, has a key that is not read, or has the id of another item.
    """
    if isinstance(source, Path):
        source = ItemsFile(source)
    files = _files(source)
    items: list[SuiteItem] = []
    places: dict[str, str] = {}
    counts: dict[str | None, int] = {}
    for file in files:
        category = _category(file, source.category_of_file)
        for number, (location, fields) in enumerate(_records(file, source.columns), start=1):
            if limit is not None and counts.get(category, 0) == limit:
                break
            name = f"{number}" if len(files) == 1 else f"{file.stem}-{number}"
            item = located(location, _read_item, fields, name, location, category, source.answers_are)
            located(location, locate_media, Conversation(item.messages, item.tools), picture_folder(file))
            if item.id in places:
                message = f"{location}: id {item.id!r} is also that of {places[item.id]}; give each item an id of its own"
                raise ValueError(message)
            places[item.id] = location
            counts[category] = counts.get(category, 0) + 1
            items.append(item)
    if not items:
        raise ValueError(f"{source.pattern} has no items; write one record for each question")
    return items


def _files(source: ItemsFile) -> list[Path]:
    """Return the files of a pattern in the order of their names."""
    pattern = source.pattern
    files = [pattern] if pattern.is_file() else sorted(Path(path) for path in glob.glob(str(pattern)) if Path(path).is_file())
    if not files:
        place = f"{source.stated_as}: " if source.stated_as else ""
        raise FileNotFoundError(
            f"{place}{pattern}: no such file of items; its path is relative to the folder of the suite's file, or to that of "
            "--suite-data"
        )
    return files


def _category(file: Path, pattern: str | None) -> str | None:
    """Return the category that a file's name states. Raises ValueError if it states none."""
    if pattern is None:
        return None
    match = re.search(pattern, file.name)
    if match is None or not match.groups() or match[1] is None:
        raise ValueError(f"{file}: its name has no category by the pattern {pattern!r}; correct category_of_file, or items")
    return match[1].replace("_", " ")


def _records(file: Path, columns: config.Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the location and the fields of each record of a file, under the usual names."""
    kind = format_of(file)
    for line, fields in read_file(file, kind, is_json_lines(file, kind), "question"):
        location = f"{file}:{line}"
        if isinstance(fields, Problem):
            raise ValueError(f"{location}: {fields}")
        yield location, located(location, _renamed, fields, columns)


def _renamed(fields: Item, columns: config.Columns) -> dict[str, Any]:
    """Return the fields of a record with the columns that a suite names under the usual names."""
    assert not isinstance(fields, Problem)
    renamed = dict(fields)
    for name, stated in columns.model_dump().items():
        names = [stated] if isinstance(stated, str) else stated or ()
        missing = [column for column in names if column not in renamed]
        if missing:
            raise Problem("columns", f"there is no column {missing[0]!r}, which columns.{name} names", "correct the suite")
        values = [renamed.pop(column) for column in names]
        if values:
            renamed[name] = values[0] if isinstance(stated, str) else values
    return renamed


def _read_item(fields: Mapping[str, Any], name: str, location: str, category: str | None, answers_are: AnswerKind) -> SuiteItem:
    """Read one record; the keys that are read are taken out of it, and any that remain are refused."""
    remaining = {key: value for key, value in fields.items() if value is not None}
    properties = remaining.pop("properties", {})
    if not isinstance(properties, dict):
        raise Problem("type", f"properties should be an object, not {brief(properties)}", "write its keys beside the question")
    if twice := sorted(remaining.keys() & properties.keys()):
        raise Problem("columns", f"{twice[0]} stands in the item and in its properties", "keep one of them")
    remaining |= {key: value for key, value in properties.items() if value is not None}
    unread = Unread()
    text = remaining.get("text")
    messages = _take_question(remaining, unread)
    tools = take_tools(remaining, unread)
    choices = _texts(remaining.pop("choices", ()), "choices")
    calls = _take_calls(remaining)
    item = SuiteItem(
        id=str(remaining.pop("id", name)),
        location=location,
        messages=messages,
        tools=tools,
        answers=(text,) if isinstance(text, str) else _take_answers(remaining, choices, answers_are),
        choices=choices,
        schema=_take_schema(remaining),
        category=_take_text(remaining, "category") if category is None else category,
        source=_take_text(remaining, "source"),
        tool_calls=calls,
        guidance=_take_text(remaining, "grading_guidance"),
    )
    unknown = [*map(repr, remaining), *map(repr, unread.names)]
    if unknown:
        known = (
            "id, question, prompt, messages, text, audio, language, tools, answer, expected_output, tool_calls, choices, schema, "
            "category, source, grading_guidance, properties"
        )
        raise Problem("columns", f"key {unknown[0]} is not read", f"remove it; an item has {known}")
    return item


def _take_question(remaining: dict[str, Any], unread: Unread) -> list[Message]:
    transcription = take_transcription(remaining)
    if transcription is not None:
        return [transcription]
    return with_columns(Conversation(_take_messages(remaining, unread), []), remaining).messages


def _take_messages(remaining: dict[str, Any], unread: Unread) -> list[Message]:
    names = [name for name in _QUESTIONS if name in remaining]
    if len(names) != 1:
        stated = " and ".join(names) or "no question"
        raise Problem("columns", f"the item has {stated}", f"write one of {', '.join(_QUESTIONS)}")
    value = remaining.pop(names[0])
    if names[0] == "text":
        checked_text(value, "text")
        return []
    if names[0] != "messages":
        question = checked_text(value, names[0])
        if not question.strip():
            raise Problem("columns", f"{names[0]} is empty", "write the question, or drop the record")
        return [{"role": "user", "content": question}]
    messages = read_messages(value, "messages", PLAIN, unread)
    if messages[-1].get("role") == "assistant":
        raise Problem("roles", "the last message is an assistant's, which the model is to write", "make it the expected answer")
    return messages


def _take_calls(remaining: dict[str, Any]) -> tuple[Call, ...] | None:
    """Return the expected calls: `tool_calls`, or an expected answer that is an object or a list of objects."""
    if "tool_calls" in remaining:
        return calls_of(remaining.pop("tool_calls"))
    for name in _ANSWERS:
        value = remaining.get(name)
        if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
            return calls_of(remaining.pop(name))
    return None


def _take_answers(remaining: dict[str, Any], choices: tuple[str, ...], answers_are: AnswerKind) -> tuple[str, ...]:
    names = [name for name in _ANSWERS if name in remaining]
    if len(names) == 2:
        raise Problem("columns", "the item has answer and expected_output", "keep one of them")
    if not names:
        return ()
    value = remaining.pop(names[0])
    if choices:
        return (_choice(value, choices, answers_are),)
    return _texts(value if isinstance(value, list | tuple) else [value], names[0])


def _choice(value: object, choices: tuple[str, ...], answers_are: AnswerKind) -> str:
    """Return the expected choice."""
    meanings = {
        "text": choices.index(value) if isinstance(value, str) and value in choices else -1,
        "letter": _LETTERS.find(value.upper()) if isinstance(value, str) and len(value) == 1 else -1,
        "index": _index(value),
    }
    possible = {kind: index for kind, index in meanings.items() if 0 <= index < len(choices) and answers_are in (kind, "auto")}
    if not possible:
        message = f"the answer {brief(value)} is none of the {len(choices)} choices"
        raise Problem("answer", message, "write the text, letter or index of a choice")
    # An index in a file of tables is text, and may be the text of another choice.
    if len(set(possible.values())) > 1:
        kinds = " and the ".join(possible)
        raise Problem("answer", f"the answer {brief(value)} is the {kinds} of two choices", "state answers_are in the suite")
    return choices[next(iter(possible.values()))]


def _index(value: object) -> int:
    """Return an index that is a number or its text; -1 for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else -1


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
