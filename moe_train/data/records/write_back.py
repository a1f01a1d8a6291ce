"""Write an edited record back into the columns that it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train import config
from moe_train.data.records.completion import MORE_PROMPT, SYSTEM_COLUMNS
from moe_train.data.records.conversation import read
from moe_train.data.records.media import shows_media
from moe_train.data.records.messages import MESSAGE_COLUMNS
from moe_train.data.records.normal_form import Conversation, Message, pieces_of
from moe_train.data.records.problem import Problem
from moe_train.data.records.tools import TOOL_COLUMNS
from moe_train.data.records.unread import is_empty


def denormalise(fields: Mapping[str, Any], edited: str | Conversation, record: config.Record) -> dict[str, Any] | None:
    """Return `fields` with an edited text or conversation in place of the columns that it was read from.

    Args:
        fields: The columns of the record.
        edited: The edited record.
        record: The section that the record was read with.

    Returns:
        The columns, which the section reads as the edited record; None if these columns cannot express it.
    """
    if isinstance(edited, Conversation) and shows_media(edited):
        return None  # their paths are those of this folder, and the edited record is for another one
    match record, edited:
        case config.TextRecord(column=column), str():
            written = {**fields, column: edited}
        case config.ChatRecord(), Conversation():
            written = _chat(fields, edited, record)
        case config.CompletionRecord(), Conversation():
            written = _completion(fields, edited, record)
        case _:
            return None
    try:
        # Reading back is the only proof that the columns express the edited record; every branch above may fall short.
        return written if read(written, record).record == edited else None
    except Problem:
        return None


def _chat(fields: Mapping[str, Any], edited: Conversation, record: config.ChatRecord) -> dict[str, Any]:
    """Write a conversation into the column of messages that the section names; the system text becomes a message."""
    read_from = (*(MESSAGE_COLUMNS if record.column == "messages" else (record.column,)), *TOOL_COLUMNS, *SYSTEM_COLUMNS)
    written: dict[str, Any] = {record.column: [_spelled(message, record) for message in edited.messages]}
    if edited.tools:
        written["tools"] = edited.tools
    # Columns that were merged into the messages are left out, or reading would add them a second time.
    return written | {name: value for name, value in fields.items() if name not in read_from or name in record.ignore}


def _spelled(message: Message, record: config.ChatRecord) -> Message:
    """Return a message with the keys that the section names."""
    names = {"role": record.role, "content": record.content}
    return {names.get(key, key): value for key, value in _with_parts(message).items()}


def _with_parts(message: Message) -> Message:
    """Return a message with the pieces of its texts as parts of its content, which have flags."""
    if "pieces" not in message:
        return message
    content = message["content"]
    kinds = ["text"] if isinstance(content, str) else [part["type"] for part in content]
    parts: list[dict[str, Any]] = []
    # An edit may have changed the number of texts; reading back finds it.
    for kind, pieces in zip(kinds, pieces_of(message), strict=False):
        parts += [{"type": kind, kind: piece.text, "train": piece.trained_on} for piece in pieces]
    return {key: value for key, value in message.items() if key != "pieces"} | {"content": parts}


def _completion(fields: Mapping[str, Any], edited: Conversation, record: config.CompletionRecord) -> dict[str, Any]:
    """Write the texts or messages of a conversation into the columns of a prompt and a completion."""
    prompt = fields.get(record.prompt)
    completion = fields.get(record.completion)
    messages = [_with_parts(message) for message in edited.messages]
    written = dict(fields)
    # An edit keeps the number of messages of the answer; if it does not, reading back finds the difference.
    size = len(completion) if isinstance(completion, list) else 1
    written[record.completion] = messages[-size:] if isinstance(completion, list) else messages[-1].get("content")
    before = messages[:-size]
    if isinstance(prompt, list):
        written[record.prompt] = before
    # With more of the prompt in other columns, the joined question cannot be told apart again.
    elif before and all(is_empty(fields.get(name)) for name in MORE_PROMPT if name != record.prompt):
        written[record.prompt] = before[-1].get("content")
    return written
