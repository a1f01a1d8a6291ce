"""Sound in records: parts of contents, columns of sound with placeholders in the texts, and transcriptions.

A clip is a part {type: audio, audio: REFERENCE} in the normal form, where the reference is a data URL or the path of a file in the
folder of the records. Nothing is fetched. A user's message that is one clip to transcribe has `transcribe`: its language, or "".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moe_train import config
from moe_train.data.records.normal_form import TRANSCRIBE, Conversation, Message
from moe_train.data.records.problem import NoColumn, Problem, brief, text_field
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import is_empty
from moe_train.data.sound.read import RULE

SOUND_COLUMNS = ("audios", "audio")
"""Columns of a record that hold its sound, as LLaMA-Factory and ms-swift write them."""
PLACEHOLDER = "<audio>"
"""What stands in a text for a clip of the column."""
SOUND_PARTS = ("audio", "audio_url", "input_audio")
"""Types of parts that are sound."""
_REMEDY = 'write {"type": "audio", "audio": "FILE"}, with a file in the folder of the records, or a data URL'
_COLUMN_REMEDY = f"write one clip for each {PLACEHOLDER} of the user's texts"
_LANGUAGE = re.compile(r"[a-z]{2}")
"""A language as mistral-common takes it: ISO 639-1."""


def read_sound_part(remaining: dict[str, Any], location: str) -> dict[str, Any]:
    """Take a clip out of a part; the reference is None if the part only says where a clip of the column belongs.

    Raises:
        Problem: the part has no single clip, or one that is written in an unknown way.
    """
    keys = [key for key in ("audio", "audio_url", "input_audio", "url", "path", "base64") if key in remaining]
    if not keys:
        return {"type": "audio", "audio": None}
    if len(keys) > 1:
        raise Problem(RULE, f"{location} has both {keys[0]} and {keys[1]}", "keep the one that is meant")
    value = remaining.pop(keys[0])
    if keys[0] == "base64" or (keys[0] == "input_audio" and isinstance(value, str)):
        value = {"data": value}
    return {"type": "audio", "audio": reference_of(value, location)}


def reference_of(value: Any, location: str) -> str:
    """Return the reference to a clip in one of its spellings.

    Raises:
        Problem: the value is none of them.
    """
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
        if isinstance(value.get("data"), str) and value.keys() <= {"data", "format"}:  # OpenAI's
            data = value["data"]
            # Mistral's API takes data URLs there too.
            return data if data.startswith("data:") or "://" in data else f"data:audio/{value.get('format', 'wav')};base64,{data}"
        if "array" in value:
            message = f"{location} has decoded samples, which are not read"
            raise Problem(RULE, message, "store files instead: Dataset.cast_column(NAME, Audio(decode=False))")
        stated = [value[key] for key in ("bytes", "url", "path") if isinstance(value.get(key), str)]
        value = stated[0] if stated else value
    if not isinstance(value, str) or not value:
        raise Problem(RULE, f"{location} should be sound, not {brief(value)}", _REMEDY)
    return value


def take_sound_column(remaining: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Take the column of sound out of a record's columns, and return the clips; [] without such a column."""
    present = [name for name in SOUND_COLUMNS if not is_empty(remaining.get(name)) and name not in ignore]
    if not present:
        return []
    if len(present) > 1:
        raise Problem(RULE, f"the record has both {present[0]} and {present[1]}", f"leave one out by name: ignore: [{present[1]}]")
    (column,) = present
    value = remaining.pop(column)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = json_value(value, column, _COLUMN_REMEDY)
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [reference_of(item, f"entry {i} of {column}") for i, item in enumerate(values)]


def take_sound(fields: Mapping[str, Any], record: config.Record) -> tuple[Mapping[str, Any], list[str]]:
    """Take the column of sound out of a record of messages or of a prompt; returns the other columns, and the clips."""
    if not isinstance(record, config.ChatRecord | config.CompletionRecord):
        return fields, []
    if all(is_empty(fields.get(name)) for name in SOUND_COLUMNS):
        return fields, []
    remaining = dict(fields)
    return remaining, take_sound_column(remaining, record.ignore)


def with_sound(conversation: Conversation, clips: Sequence[str]) -> Conversation:
    """Put the clips of a column where the texts and parts of the user's messages say.

    Raises:
        Problem: there are more or fewer places than clips, or the assistant has one.
    """
    if not clips and not any(map(_may_sound, conversation.messages)):
        return conversation  # the fast path for almost all records
    messages = [_split_at_placeholders(message) for message in conversation.messages] if clips else conversation.messages
    places = 0
    for i, message in enumerate(messages):
        if not clips and _looks_like_placeholder(message):
            error_text = f"message {i} has the placeholder {PLACEHOLDER}, and the record has no sound"
            raise Problem(RULE, error_text, "name it in a column audios, or leave the placeholder out")
        of_message = list(sound_parts(message))
        if of_message and message.get("role") != "user":
            raise Problem(RULE, f"message {i} is {message.get('role')}, and has sound", "sound belongs into the user's messages")
        places += sum(part["audio"] is None for part in of_message)
    if places != len(clips):
        raise Problem(RULE, f"the record has {len(clips)} clips in its column, and {places} places for them", _COLUMN_REMEDY)
    if not clips:
        return conversation
    following = iter(clips)
    return conversation._replace(messages=[_filled(message, following) for message in messages])


def sound_parts(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the parts of a message that are sound."""
    content = message.get("content")
    if content.__class__ is list:
        yield from (part for part in content if part["type"] == "audio")


def _may_sound(message: Message) -> bool:
    """Return whether a message may have sound or a placeholder."""
    content = message.get("content")
    return content.__class__ is list or (content.__class__ is str and PLACEHOLDER in content)


def _looks_like_placeholder(message: Message) -> bool:
    """Return whether a text of the user begins or ends with a placeholder, which markup in a text hardly does."""
    if message.get("role") != "user":
        return False
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or () if part["type"] == "text"]
    stripped = [text.strip() for text in texts if isinstance(text, str)]
    return any(text.startswith(PLACEHOLDER) or text.endswith(PLACEHOLDER) for text in stripped)


def _split_at_placeholders(message: Message) -> Message:
    """Return a message of the user with parts in place of the placeholders in its texts."""
    content = message.get("content")
    if message.get("role") != "user" or content is None:
        return message
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not any(part["type"] == "text" and PLACEHOLDER in part["text"] for part in parts):
        return message
    split: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            split.append(part)
            continue
        for i, text in enumerate(part["text"].split(PLACEHOLDER)):
            if i:
                split.append({"type": "audio", "audio": None})
            # Without the white space that set it apart from the clip.
            if text.strip():
                split.append({"type": "text", "text": text.strip()})
    return message | {"content": split}


def _filled(message: Message, clips: Iterator[str]) -> Message:
    """Return a message whose places have the next clips."""
    if not any(True for _ in sound_parts(message)):
        return message
    content = []
    for part in message["content"]:
        is_place = part["type"] == "audio" and part["audio"] is None
        content.append(part | {"audio": next(clips)} if is_place else part)
    return message | {"content": content}


def transcription_message(reference: str, language: Any) -> Message:
    """Return the message of a user who asks for the transcription of a clip.

    Args:
        reference: the clip.
        language: its language (ISO 639-1); None if it is not stated.

    Raises:
        Problem: that is no language.
    """
    if is_empty(language):
        language = ""
    elif not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise Problem(RULE, f"language is {brief(language)}, which is no code of two letters", "write one of ISO 639-1, such as en")
    return {"role": "user", "content": [{"type": "audio", "audio": reference}], TRANSCRIBE: language}


def read_transcription(remaining: dict[str, Any], record: config.TranscriptionRecord) -> Conversation:
    """Read a clip and its transcript; what is read is taken out of `remaining`."""
    if is_empty(remaining.get(record.audio)):
        raise NoColumn(record.audio, list(remaining))
    reference = reference_of(remaining.pop(record.audio), f"column {record.audio}")
    text = text_field(remaining, record.text)
    remaining.pop(record.text)
    question = transcription_message(reference, remaining.pop(record.language, None))
    return Conversation([question, {"role": "assistant", "content": text}], [])


def take_transcription(remaining: dict[str, Any]) -> Message | None:
    """Take a request for a transcription out of a prompt's columns: `audio`, and `language` if it is stated; None without one."""
    if any(name in remaining for name in ("messages", "prompt", "question")) or is_empty(remaining.get("audio")):
        return None
    return transcription_message(reference_of(remaining.pop("audio"), "column audio"), remaining.pop("language", None))
