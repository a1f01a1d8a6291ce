"""Normal form of records: every supported spelling becomes a text, a conversation, a preference pair or a labelled answer.

    section = recognise(fields)                 # a config.Record that fits the record, by its columns
    record, unread = read(fields, section)      # the normal form, and the names of the keys that were not read

Supported spellings (`…` stands for a list, which may also be JSON text):

| columns | |
|---|---|
| `text` or `content` | plain text |
| `messages: […]`, `tools: […]` | OpenAI's and Mistral's; also `interactions`, `available_tools`, `functions`, `system` |
| `conversations: [{from, value}]` | ShareGPT's: human, gpt, system, function_call, observation |
| `conversation: [{human, assistant}]`, `[{input, output}]` | ms-swift's, XTuner's |
| `prompt`, `completion`; `question`, `answer`; `instruction`, `input`, `output`; `query`, `response` | see `completion` |
| the above with `label` | an answer that is good or bad; see `preference` |
| `prompt`, `chosen`, `rejected` | a preference pair; see `preference` |
| `text` or `messages`, `labels` | labels of targets; see `classified` |
| `audio`, `text` or `transcript`, `language` | a transcription; see `transcription` |

The normal form is that of `normal_form`. Keys with the value null are left out, because columnar files fill missing keys with
null. A key that is not read is named; one that changes the meaning is a Problem, unless the section ignores it by name. Apart
from that only what cannot be interpreted is rejected: an unknown role, or a call without a result, passes and is found later by
`rules`. Training and `check` both read records through this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.records.classified import take_labels
from moe_train.data.records.completion import (
    MORE_PROMPT,
    SYSTEM_COLUMNS,
    read_completion,
    take,
    with_system,
)
from moe_train.data.records.meaning import RECORD, lost_meaning
from moe_train.data.records.media import refuse_media, take_columns, with_media
from moe_train.data.records.media_parts import COLUMNS
from moe_train.data.records.messages import MESSAGE_COLUMNS, read_messages
from moe_train.data.records.normal_form import ClassifiedText, Conversation, LabelledAnswer, NormalRecord
from moe_train.data.records.preference import read_pair, take_label, take_margin
from moe_train.data.records.problem import NoColumn, Problem, brief, text_field
from moe_train.data.records.recognise import TEXT_COLUMNS, recognise
from moe_train.data.records.settings import SETTINGS, default_settings, take_settings
from moe_train.data.records.tool_call_text import read_tool_call_text
from moe_train.data.records.tools import TOOL_COLUMNS, take_tools
from moe_train.data.records.transcription import read_transcription
from moe_train.data.records.unread import Unread, is_empty


class Reading(NamedTuple):
    """A record that has been read."""

    record: NormalRecord
    unread: tuple[str, ...]
    """Names of the keys that were not read."""


def normalise(fields: Mapping[str, Any], record: config.Record) -> NormalRecord:
    """Return the normal form that `read` finds."""
    return read(fields, record).record


def read(fields: Mapping[str, Any], record: config.Record) -> Reading:
    """Convert a record to the normal form, in which paths of pictures and sound are as written (`media.locate_media`).

    Args:
        fields: The columns of the record.
        record: The section that says how to read them.

    Raises:
        Problem: If the record has no normal form, or a key that changes its meaning is not read.
    """
    unread = Unread(record.ignore)
    fields, media = take_columns(fields, record)
    try:
        normal = _read(fields, record, unread)
    except NoColumn as problem:
        raise _missing_column(problem, fields, record) from None
    if isinstance(normal, Conversation):
        normal = with_media(normal, media)
    else:
        refuse_media(normal)
    return Reading(normal, tuple(unread.names))


def _missing_column(problem: NoColumn, fields: Mapping[str, Any], record: config.Record) -> Problem:
    """Return what is wrong with a record that lacks a column that its section names."""
    if problem.column in fields:
        return Problem("columns", f"column {problem.column!r} is null or empty", "write its value, or drop the record")
    # With all columns: those that were read before this one was missed have been taken away.
    problem = NoColumn(problem.column, list(map(str, fields)))
    try:
        section = recognise(fields, record.ignore)
    except Problem:
        return problem
    if section.name == record.name:
        stated = _other_columns(section, record)
        if not stated:
            return problem
        return Problem("columns", problem.message, f"state {stated} in the record section of a source of such records")
    columns = brief(", ".join(map(str, fields)))
    message = f"the record is of the kind {section.name} ({columns}), and its source is read as {record.name}"
    remedy = "put each kind of records into files of its own, or name the columns with --map (in a config: in the record section)"
    return Problem("mixed-kinds", message, remedy)


def _other_columns(section: config.Record, record: config.Record) -> str:
    """Return the columns that a section states differently from another one of its kind, as YAML; empty if there are none."""
    columns = section.model_dump(mode="json", exclude={"name", "ignore", "too_long"}, exclude_unset=True)
    of_record = record.model_dump(mode="json")
    return ", ".join(f"{name}: {json.dumps(column)}" for name, column in columns.items() if column != of_record[name])


def _read(fields: Mapping[str, Any], record: config.Record, unread: Unread) -> NormalRecord:
    """Convert a record to the normal form."""
    normal: NormalRecord
    match record:
        case config.TextRecord():
            normal = _text(fields, record, unread)
        case config.ChatRecord():
            normal = _conversation(fields, record, unread)
        case config.CompletionRecord():
            remaining = unread.opened(RECORD, fields)
            normal = read_completion(remaining, record, unread)
            unread.close("the record", RECORD, remaining)
        case config.PreferenceRecord():
            remaining = unread.opened(RECORD, fields)
            margin = take_margin(remaining, record.margin)
            normal = read_pair(remaining, record, unread)._replace(margin=margin)
            unread.close("the record", RECORD, remaining)
        case config.LabelledRecord():
            normal = _labelled(fields, record, unread)
        case config.ClassificationRecord():
            normal = _classified(fields, record, unread)
        case config.TranscriptionRecord():
            remaining = unread.opened(RECORD, fields)
            normal = read_transcription(remaining, record)
            unread.close("the record", RECORD, remaining)
    return normal


def columns_to_load(record: config.Record, present: Iterable[str]) -> list[str]:
    """Return those columns of a table that `read` needs: those that it may read, and those that change the meaning of a record."""
    may_read = _may_read(record)
    # Columns that change the meaning are loaded only to be refused where they hold anything.
    return [name for name in present if name in may_read or lost_meaning(RECORD, name) is not None]


def text_column(record: config.Record) -> str:
    """Return the column in which `read` expects the text of a text file."""
    return record.column if isinstance(record, config.TextRecord) else TEXT_COLUMNS[0]


def read_columns(record: config.Record) -> tuple[str, ...]:
    """Return the columns whose values `read` may use."""
    return tuple(name for name in dict.fromkeys(_may_read(record)) if name not in record.ignore)


def _may_read(record: config.Record) -> list[str]:
    """Return the columns that a kind of record has a place for, those that are ignored included."""
    names: tuple[str | None, ...]
    match record:
        case config.TextRecord(column=column):
            # The other text column is loaded too, so that a record with both is refused rather than half of it read.
            names = (column, *TEXT_COLUMNS) if column in TEXT_COLUMNS else (column,)
        case config.ChatRecord():
            names = _message_columns(record)
        case config.CompletionRecord(prompt=prompt, completion=completion):
            names = (prompt, completion)
        case config.PreferenceRecord(prompt=question, chosen=chosen, rejected=rejected, margin=margin):
            names = (question, chosen, rejected, margin)
        case config.LabelledRecord(messages=messages, prompt=prompt, completion=completion, label=label):
            names = (messages, prompt, completion, label)
        case config.ClassificationRecord(text=text, messages=messages, labels=labels):
            names = (text, messages, labels)
        case config.TranscriptionRecord(audio=audio, text=text, language=language):
            return [audio, text, language]
    media = COLUMNS if isinstance(record, config.ChatRecord | config.CompletionRecord) else ()
    every = (*names, *media, *TOOL_COLUMNS, *SYSTEM_COLUMNS, *MORE_PROMPT, *SETTINGS)
    return [name for name in every if name is not None]


def _text(fields: Mapping[str, Any], record: config.TextRecord, unread: Unread) -> str:
    """Read a plain text."""
    column = record.column
    if len(fields) == 1 and column in fields:
        return text_field(fields, column)  # the fast path for most texts
    if column in TEXT_COLUMNS and all(fields.get(name) is not None and name not in unread.ignore for name in TEXT_COLUMNS):
        raise Problem("text-and-content", "the record has both text and content", "keep the one that is meant")
    text = text_field(fields, column)
    remaining = unread.opened(RECORD, fields)
    # A column that is also ignored by name is gone already, and its text was read all the same.
    remaining.pop(column, None)
    unread.close("the record", RECORD, remaining)
    return text


def _message_columns(record: config.ChatRecord) -> tuple[str, ...]:
    """Return the columns in which the messages of a record may be."""
    return MESSAGE_COLUMNS if record.column == "messages" else (record.column,)


def _conversation(fields: Mapping[str, Any], record: config.ChatRecord, unread: Unread) -> Conversation:
    """Read a chat record: its messages, a system prompt in a column of its own, its tools and its settings."""
    # Fast path for most chats: with one column, no tools, settings or unread keys have to be looked for.
    if len(fields) == 1 and record.column in fields:
        messages = read_messages(fields[record.column], record.column, record, unread)
        return Conversation(messages, [], default_settings(record))
    remaining = unread.opened(RECORD, fields)
    conversation = _take_conversation(remaining, record, unread)
    unread.close("the record", RECORD, remaining)
    return conversation


def _take_conversation(remaining: dict[str, Any], record: config.ChatRecord, unread: Unread) -> Conversation:
    """Take a conversation out of a record."""
    names = [name for name in _message_columns(record) if not is_empty(remaining.get(name))]
    if len(names) > 1:
        raise Problem("columns", f"the record has both {names[0]} and {names[1]}", "keep the one that is meant")
    column = names[0] if names else record.column
    messages = read_messages(take(remaining, column), column, record, unread)
    for name in _message_columns(record):
        remaining.pop(name, None)  # empty, or read
    tools = take_tools(remaining, unread)
    messages = read_tool_call_text(with_system(remaining, messages), tools, unread)
    return Conversation(messages, tools, take_settings(remaining, record))


def _labelled(fields: Mapping[str, Any], record: config.LabelledRecord, unread: Unread) -> LabelledAnswer:
    """Read a conversation whose last answer is labelled."""
    remaining = unread.opened(RECORD, fields)
    good = take_label(remaining, record.label)
    if record.messages is not None:
        conversation = _take_conversation(
            remaining, config.ChatRecord(name="chat", column=record.messages, **_settings(record)), unread
        )
    else:
        section = config.CompletionRecord(
            name="completion", prompt=record.prompt, completion=record.completion, **_settings(record)
        )
        conversation = read_completion(remaining, section, unread)
    unread.close("the record", RECORD, remaining)
    return LabelledAnswer(conversation, good)


def _classified(fields: Mapping[str, Any], record: config.ClassificationRecord, unread: Unread) -> ClassifiedText:
    """Read a text or a conversation with its labels."""
    remaining = unread.opened(RECORD, fields)
    labels = take_labels(remaining, record.labels, record.targets)
    has_text, has_messages = (not is_empty(remaining.get(column)) for column in (record.text, record.messages))
    if has_text and has_messages:
        raise Problem("columns", f"the record has both {record.text} and {record.messages}", "keep the one that is meant")
    content: str | Conversation
    if has_messages:
        section = config.ChatRecord(name="chat", column=record.messages, **_settings(record))
        content = _take_conversation(remaining, section, unread)
    else:
        content = text_field(remaining, record.text)
    for column in (record.text, record.messages):
        remaining.pop(column, None)  # empty, or read
    unread.close("the record", RECORD, remaining)
    return ClassifiedText(content, labels)


def _settings(record: config.ConversationRecord) -> dict[str, Any]:
    """Return the settings of a section, for another section."""
    return {name: getattr(record, name) for name in SETTINGS}
