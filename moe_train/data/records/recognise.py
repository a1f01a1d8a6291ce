"""Recognize the kind of a record by its columns."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moe_train import config
from moe_train.data.records.completion import ANSWERS
from moe_train.data.records.messages import MESSAGE_COLUMNS
from moe_train.data.records.preference import is_label
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tools import TOOL_COLUMNS
from moe_train.data.records.unread import is_empty

TEXT_COLUMNS = ("text", "content")
"""Columns that may hold a plain text."""
_TURNS = (
    ("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("query", "response"),
    ("instruction", "response"), ("question", "response"), ("prompt", "response"), ("input", "output"),
)  # fmt: skip
_QUESTIONS = ("prompt", "question", "instruction", "query")
_ANSWERS = ("completion", "answer", "output", "response")
_PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
)  # fmt: skip
_REJECTED = ("rejected_response", "rejected_messages")
_PROMPTS = ("prompt", "question", "instruction", "query", *MESSAGE_COLUMNS, "input")
_LABELS = ("label", "kto_tag")
_TRANSCRIPTS = ("text", "transcript", "transcription", "sentence")


def recognise(fields: Mapping[str, Any], ignore: Collection[str] = ()) -> config.Record:
    """Return the record section that fits a record, by its columns.

    Args:
        fields: The columns of the record.
        ignore: Keys that are not to be read.

    Raises:
        Problem: If no section fits.
    """
    present = {name for name, value in fields.items() if value is not None and name not in ignore}
    ignored = tuple(sorted(ignore))
    # Pairs come first: they have the columns of a prompt as well, and often those of a whole conversation.
    pair = _pair(fields, present)
    if pair is not None:
        prompt, chosen, rejected = pair
        return config.PreferenceRecord(name="preference", prompt=prompt, chosen=chosen, rejected=rejected, ignore=ignored)
    answered = _answered(fields, present)
    label = next((name for name in _LABELS if name in present and is_label(fields[name])), None)
    if isinstance(answered, str):
        if label is not None:
            return config.LabelledRecord(name="labelled", label=label, messages=answered, ignore=ignored)
        # The three columns of messages are one kind of record, which the section of the first reads.
        return _chat(ignored)
    if answered is not None:
        prompt, completion = answered
        if label is not None:
            return config.LabelledRecord(name="labelled", label=label, prompt=prompt, completion=completion, ignore=ignored)
        return _completion(prompt, completion, ignored)
    if not is_empty(fields.get("audio")) and "audio" not in ignored:
        transcript = next((name for name in _TRANSCRIPTS if name in present), None)
        if transcript is not None:
            return _transcription(transcript, ignored)
    return _text(fields, ignored)


# Cached, since a section is validated when it is made, and this runs for every record.
@functools.cache
def _chat(ignored: tuple[str, ...]) -> config.ChatRecord:
    """Return the section of messages."""
    return config.ChatRecord(name="chat", ignore=ignored)


@functools.cache
def _completion(prompt: str, completion: str, ignored: tuple[str, ...]) -> config.CompletionRecord:
    """Return the section of a completion."""
    return config.CompletionRecord(name="completion", prompt=prompt, completion=completion, ignore=ignored)


@functools.cache
def _transcription(text: str, ignored: tuple[str, ...]) -> config.TranscriptionRecord:
    """Return the section of a clip and its transcript."""
    return config.TranscriptionRecord(name="transcription", text=text, ignore=ignored)


def _text(fields: Mapping[str, Any], ignored: tuple[str, ...]) -> config.TextRecord:
    """Return the section of a plain text. Raises Problem if the record has no column for it, or two."""
    columns = [name for name in TEXT_COLUMNS if fields.get(name) is not None and name not in ignored]
    if len(columns) > 1:
        raise Problem("text-and-content", "the record has both text and content", "keep the one that is meant")
    if "role" in fields or {"from", "value"} <= fields.keys():
        message = "the record is one message, and not a conversation"
        raise Problem("columns", message, 'write one object for each conversation: {"messages": […]}')
    for column in columns:
        return config.TextRecord(name="text", column=column, ignore=ignored)
    if not fields:
        raise Problem("columns", "the record has no columns", "drop it")
    _check_filled(fields, ignored)
    supported = (
        "text, messages, conversations, prompt and completion, question and answer, instruction and output, query and response"
    )
    names = ", ".join(str(name) or "''" for name in fields)
    raise Problem(
        "columns",
        f"no column is one of {supported}; the record has {brief(names)}",
        "name the columns, as in --map messages=COLUMN, or --map prompt=COLUMN --map completion=COLUMN (in a config: in the record "
        "section)",
    )


def _check_filled(fields: Mapping[str, Any], ignored: tuple[str, ...]) -> None:
    """Raise Problem if a record has the columns of a kind, and a null or an empty cell in one of them."""
    for columns in (*_PAIRS, *_TURNS, *((name,) for name in (*MESSAGE_COLUMNS, *TEXT_COLUMNS))):
        if all(name in fields and name not in ignored for name in columns):
            empty = " and ".join(repr(name) for name in columns if fields[name] is None)
            raise Problem("columns", f"column {empty} is null or empty", "write its value, or drop the record")


def _pair(fields: Mapping[str, Any], present: set[str]) -> tuple[str | None, str, str] | None:
    """Return the columns (prompt, chosen, rejected) of a preference pair; None if the record is none."""
    prompt = next((name for name in _PROMPTS if name in present), None)
    for chosen, rejected in _PAIRS:
        if {chosen, rejected} <= present:
            if prompt in _QUESTIONS:
                _check_only(prompt, _QUESTIONS, fields, present)
            return prompt, chosen, rejected
    # ms-swift: the conversation or the answer itself is the chosen one, and only the rejected one has a column of its own.
    for rejected in _REJECTED:
        if rejected in present:
            answered = _answered(fields, present)
            if isinstance(answered, str):
                return answered, answered, rejected
            if answered is not None:
                return answered[0], answered[1], rejected
    if ANSWERS in present and prompt is not None and _has_ranks(fields[ANSWERS]):
        return prompt, ANSWERS, ANSWERS
    return None


def _has_ranks(answers: Any) -> bool:
    """Return whether a value is a list of answers with ranks, or its JSON text."""
    if isinstance(answers, str):
        return '"rank"' in answers
    return isinstance(answers, list | tuple) and any(isinstance(entry, dict) and "rank" in entry for entry in answers)


def _answered(fields: Mapping[str, Any], present: set[str]) -> str | tuple[str, str] | None:
    """Return the column of the messages, or the columns of prompt and completion; None if there are none."""
    for column in MESSAGE_COLUMNS:
        if column in present:
            return column
    for prompt, completion in _TURNS:
        if {prompt, completion} <= present:
            _check_only(prompt, _QUESTIONS, fields, present)
            _check_only(completion, _ANSWERS, fields, present)
            return prompt, completion
    if "query" in present and ANSWERS in present and any(fields.get(column) for column in TOOL_COLUMNS):
        return "query", ANSWERS  # xLAM's calls
    return None


def _check_only(column: str, alternatives: Sequence[str], fields: Mapping[str, Any], present: set[str]) -> None:
    """Raise Problem if another column of the same meaning holds something else: which one is meant would be a guess."""
    for name in alternatives:
        if name in present and not is_empty(fields[name]) and fields[name] != fields[column]:
            message = f"the record has both {column} and {name}, which differ"
            raise Problem("columns", message, f"name the columns with --map, or leave one out by name: --ignore {name}")
