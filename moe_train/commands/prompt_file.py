"""Prompts from a file of records: texts to continue, or conversations with tools to answer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.data.records.local_files import picture_folder
from moe_train.data.records.media import locate_media, with_columns
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem, brief, checked_text, located
from moe_train.data.records.read_each import read_each, refuse_unread
from moe_train.data.records.tools import take_tools
from moe_train.data.records.transcription import take_transcription
from moe_train.data.records.unread import Unread


class PromptRecord(NamedTuple):
    """A prompt of a file."""

    location: str
    """File and line, for messages."""
    id: object
    """The record's own `id`; None if it has none."""
    messages: list[Message]
    """The conversation to answer; a prompt that is a text is a single turn of the user."""
    tools: list[dict[str, Any]]
    """The tools that the model is told of."""
    text: str | None
    """The text, of a prompt that is a text."""


def read_prompt_file(file: Path) -> list[PromptRecord]:
    """Read the prompts of a file, in any format that records can have: a record has `messages` and `tools`,
    `prompt`, or `audio` to transcribe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A record cannot be read or has a key that is not read; the message begins with its file and line.
    """
    folder = picture_folder(file)
    return read_each(file, "prompt", "prompt", partial(_read_prompt, folder=folder))


def _read_prompt(remaining: dict[str, Any], location: str, folder: Path | None) -> PromptRecord:
    """Read one record; the keys that are read are taken out of it, and any that remain are refused."""
    unread = Unread()
    record_id = remaining.pop("id", None)
    tools = take_tools(remaining, unread)
    text = None
    transcription = take_transcription(remaining)
    if "messages" in remaining and "prompt" in remaining:
        raise Problem("columns", "the record has messages and prompt", "keep one of them")
    if transcription is not None:
        messages: list[Message] = [transcription]
        locate_media(Conversation(messages, tools), folder)
    elif "prompt" in remaining:
        text = checked_text(remaining.pop("prompt"), "prompt")
        messages = [{"role": "user", "content": text}]
    elif "messages" in remaining:
        conversation = Conversation(read_messages(remaining.pop("messages"), "messages", PLAIN, unread), tools)
        conversation = with_columns(conversation, remaining)
        locate_media(conversation, folder)
        messages = conversation.messages
        if messages[-1].get("role") == "assistant":
            raise Problem("roles", "the last message is an assistant's, which the model is to write", "remove it")
    else:
        raise Problem("columns", "the record has neither messages nor prompt nor audio", "write one of them")
    refuse_unread(remaining, unread, "a prompt has messages, prompt, audio, language, images, audios, tools, id")
    return PromptRecord(location, record_id, messages, tools, text)


def read_schema_file(file: Path) -> dict[str, Any]:
    """Read a JSON schema.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or not an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; write a JSON schema into it")
    value = _json_of(file, "a JSON schema")
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON schema should be an object, not {brief(value)}; write {{type, properties, …}}")
    return value


def _json_of(file: Path, what: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); write {what}") from error


def read_tools_file(file: Path) -> tuple[dict[str, Any], ...]:
    """Read a JSON file with a list of tools.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or a tool cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of tools; write a JSON list of {{type, function: {{name, parameters}}}}")
    value = _json_of(file, "a JSON list of tools")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{file}: the tools should be a list with at least one tool, not {brief(value)}; write [tool, …]")
    unread = Unread()
    tools: list[dict[str, Any]] = located(str(file), take_tools, {"tools": value}, unread)
    if unread.names:
        raise ValueError(f"{file}: key {next(iter(unread.names))!r} of a tool is not read; remove it")
    return tuple(tools)
