"""Pictures and sound of records: columns with placeholders in the texts, the messages that may have them, and their files."""

from __future__ import annotations

import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.records.media_parts import COLUMNS, KINDS, MediaKind, reference_of
from moe_train.data.records.normal_form import MEDIA, Conversation, Message, NormalRecord, messages_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import is_empty

Columns = Mapping[MediaKind, Sequence[str]]
"""References of the files of each kind that a record has columns for."""


def media_parts(message: Message, kind: MediaKind | None = None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a message that are pictures or sound; None for both kinds."""
    content = message.get("content")
    if content.__class__ is list:
        types = MEDIA if kind is None else (kind.part,)
        yield from (part for part in content if part["type"] in types)


def has_media(message: Message) -> bool:
    """Return whether a message has a picture or sound."""
    return any(True for _ in media_parts(message))


def shows_media(record: NormalRecord) -> bool:
    """Return whether a record has a picture or sound."""
    return any(map(has_media, messages_of(record)))


def references_of(messages: Sequence[Message], kind: MediaKind | None = None) -> list[str]:
    """Return the references of all pictures or clips of messages, in order; None for both kinds."""
    references: list[str] = []
    for message in messages:
        references += [part[part["type"]] for part in media_parts(message, kind)]
    return references


def take_columns(fields: Mapping[str, Any], record: config.Record) -> tuple[Mapping[str, Any], Columns]:
    """Take the columns of pictures and sound out of a record of messages or of a prompt.

    Returns:
        The remaining columns, and the references; {} without such columns.
    """
    if not isinstance(record, config.ChatRecord | config.CompletionRecord):
        return fields, {}
    if all(is_empty(fields.get(name)) for name in COLUMNS):
        return fields, {}
    remaining = dict(fields)
    return remaining, {kind: _take_column(remaining, kind, record.ignore) for kind in KINDS}


def _take_column(remaining: dict[str, Any], kind: MediaKind, ignore: Collection[str] = ()) -> list[str]:
    """Take the column of a kind out of a record's columns, and return the references; [] without such a column."""
    present = [name for name in kind.columns if not is_empty(remaining.get(name)) and name not in ignore]
    if not present:
        return []
    if len(present) > 1:
        error_text = f"the record has both {present[0]} and {present[1]}"
        raise Problem(kind.rule, error_text, f"leave one out by name: ignore: [{present[1]}]")
    (column,) = present
    value = remaining.pop(column)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = json_value(value, column, kind.column_remedy)
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [reference_of(item, kind, f"entry {i} of {column}") for i, item in enumerate(values)]


def with_columns(conversation: Conversation, remaining: dict[str, Any]) -> Conversation:
    """Take the columns of pictures and of sound out of `remaining`, and put what they hold into the user's messages."""
    return with_media(conversation, {kind: _take_column(remaining, kind) for kind in KINDS})


def with_media(conversation: Conversation, columns: Columns) -> Conversation:
    """Put the files of columns where the texts and parts of the user's messages say.

    Raises:
        Problem: there are more or fewer places than files, or a message has one whose role may have none.
    """
    if not any(columns.values()) and not any(map(_may_have_media, conversation.messages)):
        return conversation  # the fast path for almost all records
    for kind in KINDS:
        conversation = conversation._replace(messages=_placed(conversation.messages, kind, columns.get(kind, ())))
    return conversation


def _may_have_media(message: Message) -> bool:
    """Return whether a message may have a picture, sound or a placeholder."""
    content = message.get("content")
    if content.__class__ is str:
        return any(kind.placeholder in content for kind in KINDS)
    return content.__class__ is list


def _placed(messages: list[Message], kind: MediaKind, references: Sequence[str]) -> list[Message]:
    """Return messages with the files of a kind in their places."""
    if references:
        messages = [_split_at_placeholders(message, kind) for message in messages]
    places: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if not references and _looks_like_placeholder(message, kind):
            error_text = f"message {i} has the placeholder {kind.placeholder}, and the record has no {kind.items}"
            raise Problem(kind.rule, error_text, f"name them in a column {kind.columns[0]}, or leave the placeholder out")
        parts = list(media_parts(message, kind))
        if parts and message.get("role") not in kind.roles:
            error_text = f"message {i} is {message.get('role')}, and has {kind.substance}"
            raise Problem(kind.rule, error_text, f"{kind.items} belong into the user's messages")
        places += [part for part in parts if part[kind.part] is None]
    if len(places) != len(references):
        count = f"the record has {len(references)} {kind.items} in its column, and {len(places)} places for them"
        raise Problem(kind.rule, count, kind.column_remedy)
    # The parts are this reading's own.
    for place, reference in zip(places, references, strict=True):
        place[kind.part] = reference
    return messages


def _looks_like_placeholder(message: Message, kind: MediaKind) -> bool:
    """Return whether a text of the user begins or ends with a placeholder, which markup in a text hardly does."""
    if message.get("role") != "user":
        return False
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or () if part["type"] == "text"]
    stripped = [text.strip() for text in texts if isinstance(text, str)]
    return any(text.startswith(kind.placeholder) or text.endswith(kind.placeholder) for text in stripped)


def _split_at_placeholders(message: Message, kind: MediaKind) -> Message:
    """Return a message with parts in place of the placeholders in its texts, if its role may have such parts."""
    content = message.get("content")
    if message.get("role") not in kind.roles or content is None:
        return message
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not any(part["type"] == "text" and kind.placeholder in part["text"] for part in parts):
        return message
    split: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            split.append(part)
            continue
        for i, text in enumerate(part["text"].split(kind.placeholder)):
            if i:
                split.append({"type": kind.part, kind.part: None})
            # Without the white space that set it apart from the file.
            if text.strip():
                split.append({"type": "text", "text": text.strip()})
    return message | {"content": split}


def refuse_media(record: NormalRecord) -> None:
    """Raise Problem if a record of a kind that takes neither pictures nor sound has one."""
    for i, message in enumerate(messages_of(record)):
        for kind in KINDS:
            if any(True for _ in media_parts(message, kind)):
                error_text = f"message {i} has {kind.substance}, and only records of messages, of a prompt or of a transcription"
                raise Problem(kind.rule, f"{error_text} take {kind.items}", "drop the record")


def locate_media(record: NormalRecord, folder: Path | None) -> None:
    """Replace the paths of pictures and sound in a record in the normal form by those of files in `folder`.

    Raises:
        Problem: a path leaves the folder, or a reference is to be fetched from a network.
    """
    for message in messages_of(record):
        for kind in KINDS:
            for part in media_parts(message, kind):
                part[kind.part] = located_path(part[kind.part], folder, kind)


def located_path(reference: str, folder: Path | None, kind: MediaKind) -> str:
    """Return the path of the file of a picture or of sound, or its data URL unchanged.

    Args:
        reference: the reference in the record.
        folder: the folder of the records; None if they are from no folder, and have data URLs only.
        kind: what the file holds.
    """
    if reference.startswith("data:"):
        return reference
    name = f"the {kind.rule} {brief(reference)}"
    scheme, separator, rest = reference.partition("://")
    if separator and scheme == "file":
        reference = urllib.parse.unquote(rest)
    elif separator:
        raise Problem(kind.rule, f"{name} is a URL, and nothing is fetched", "download it into the folder of the records")
    if folder is None:
        raise Problem(kind.rule, f"{name} is a path, and these records are from no folder", "write it as a data URL")
    root = folder.resolve()
    try:
        file = (root / reference).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, or a NUL
        raise Problem(kind.rule, f"{name} is no path: {error}", "name a file, or write a data URL") from error
    if not file.is_relative_to(root):
        message = f"{name} is outside of {folder}, the folder of its records"
        raise Problem(kind.rule, message, "move it there: records name only files beside them or below")
    return str(file)
