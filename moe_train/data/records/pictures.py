"""Pictures in records: parts of contents, columns of pictures with placeholders in the texts, and the files that they name.

A picture is a part {type: image, image: REFERENCE} in the normal form, where the reference is a data URL or the path of a file
in the folder of the records. Nothing is fetched.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.pictures.read import RULE
from moe_train.data.records.normal_form import Conversation, Message, NormalRecord, messages_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import is_empty

PICTURE_COLUMNS = ("images", "image")
"""Columns of a record that hold its pictures, as LLaMA-Factory, ms-swift and TRL write them."""
PLACEHOLDER = "<image>"
"""What stands in a text for a picture of the column."""
PICTURE_PARTS = ("image", "image_url", "input_image")
"""Types of parts that are pictures."""
_REMEDY = 'write {"type": "image", "image": "FILE"}, with a file in the folder of the records, or a data URL'
_COLUMN_REMEDY = f"write one picture for each {PLACEHOLDER} of the user's texts"


def read_picture_part(remaining: dict[str, Any], location: str) -> dict[str, Any]:
    """Take a picture out of a part; the reference is None if the part only says where a picture of the column belongs.

    Raises:
        Problem: the part has no single picture, or one that is written in an unknown way.
    """
    keys = [key for key in ("image", "image_url", "url", "path", "source", "base64") if key in remaining]
    if not keys:
        return {"type": "image", "image": None}
    if len(keys) > 1:
        raise Problem(RULE, f"{location} has both {keys[0]} and {keys[1]}", "keep the one that is meant")
    value = remaining.pop(keys[0])
    if keys[0] == "base64" and isinstance(value, str):
        value = f"data:image;base64,{value}"
    remaining.pop("detail", None)
    return {"type": "image", "image": _reference(value, location)}


def _reference(value: Any, location: str) -> str:
    """Return the reference to a picture in one of its spellings."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
        if value.get("type") == "base64" and isinstance(value.get("data"), str):  # Anthropic's
            return f"data:{value.get('media_type', 'image')};base64,{value['data']}"
        stated = [value[key] for key in ("bytes", "url", "path") if isinstance(value.get(key), str)]
        value = stated[0] if stated else value
    if not isinstance(value, str) or not value:
        raise Problem(RULE, f"{location} should be a picture, not {brief(value)}", _REMEDY)
    return value


def take_pictures(fields: Mapping[str, Any], record: config.Record) -> tuple[Mapping[str, Any], list[str]]:
    """Take the column of pictures out of a record of messages or of a prompt; returns the other columns, and the pictures."""
    if not isinstance(record, config.ChatRecord | config.CompletionRecord):
        return fields, []
    if all(is_empty(fields.get(name)) for name in PICTURE_COLUMNS):
        return fields, []
    remaining = dict(fields)
    return remaining, take_column(remaining, record.ignore)


def take_column(remaining: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Take the column of pictures out of a record's columns, and return the pictures; [] without such a column."""
    present = [name for name in PICTURE_COLUMNS if not is_empty(remaining.get(name)) and name not in ignore]
    if not present:
        return []
    if len(present) > 1:
        raise Problem(RULE, f"the record has both {present[0]} and {present[1]}", f"leave one out by name: ignore: [{present[1]}]")
    (column,) = present
    value = remaining.pop(column)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = json_value(value, column, _COLUMN_REMEDY)
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [_reference(item, f"entry {i} of {column}") for i, item in enumerate(values)]


def with_pictures(conversation: Conversation, pictures: Sequence[str]) -> Conversation:
    """Put the pictures of a column where the texts and parts of the user's messages say.

    Raises:
        Problem: there are more or fewer places than pictures, or the assistant has one.
    """
    if not pictures and not any(map(_may_show, conversation.messages)):
        return conversation  # the fast path for almost all records
    messages = [_split_at_placeholders(message) for message in conversation.messages] if pictures else conversation.messages
    places = 0
    for i, message in enumerate(messages):
        if not pictures and _looks_like_placeholder(message):
            error_text = f"message {i} has the placeholder {PLACEHOLDER}, and the record has no pictures"
            raise Problem(RULE, error_text, "name them in a column images, or leave the placeholder out")
        of_message = _picture_parts(message)
        if of_message and message.get("role") not in ("user", "tool"):
            raise Problem(
                RULE, f"message {i} is {message.get('role')}, and has a picture", "pictures belong into the user's messages"
            )
        places += sum(part["image"] is None for part in of_message)
    if places != len(pictures):
        count = f"the record has {len(pictures)} pictures in its column, and {places} places for them"
        raise Problem(RULE, count, _COLUMN_REMEDY)
    if not pictures:
        return conversation
    following = iter(pictures)
    return conversation._replace(messages=[_filled(message, following) for message in messages])


def _may_show(message: Message) -> bool:
    """Return whether a message may have a picture or a placeholder."""
    content = message.get("content")
    return content.__class__ is list or (content.__class__ is str and PLACEHOLDER in content)


def _picture_parts(message: Message) -> list[dict[str, Any]]:
    """Return the parts of a message that are pictures."""
    content = message.get("content")
    if content.__class__ is not list:
        return []
    return [part for part in content if part["type"] == "image"]


def _looks_like_placeholder(message: Message) -> bool:
    """Return whether a text of the user begins or ends with a placeholder, which markup in a text hardly does."""
    if message.get("role") != "user":
        return False
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or () if part["type"] == "text"]
    stripped = [text.strip() for text in texts if isinstance(text, str) and PLACEHOLDER in text]
    return any(text.startswith(PLACEHOLDER) or text.endswith(PLACEHOLDER) for text in stripped)


def _split_at_placeholders(message: Message) -> Message:
    """Return a message of the user with parts in place of the placeholders in its texts."""
    content = message.get("content")
    if message.get("role") not in ("user", "tool") or content is None:
        return message
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not any(part["type"] == "text" and PLACEHOLDER in part["text"] for part in parts):
        return message
    split: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            split.append(part)
            continue
        first, *others = part["text"].split(PLACEHOLDER)
        split += _text_part(first)
        for text in others:
            split += [{"type": "image", "image": None}, *_text_part(text)]
    return message | {"content": split}


def _text_part(text: str) -> list[dict[str, Any]]:
    """Return a part for a text, without the white space that set it apart from a picture; none for an empty text."""
    stripped = text.strip()
    return [{"type": "text", "text": stripped}] if stripped else []


def _filled(message: Message, pictures: Any) -> Message:
    """Return a message whose places have the next pictures."""
    if not _picture_parts(message):
        return message
    content = [
        part | {"image": next(pictures)} if part["type"] == "image" and part["image"] is None else part
        for part in message["content"]
    ]
    return message | {"content": content}


def refuse_pictures(record: NormalRecord) -> None:
    """Raise Problem if a record of a kind that takes no pictures has one."""
    for i, message in enumerate(messages_of(record)):
        if _picture_parts(message):
            error_text = f"message {i} has a picture, and only records of messages or of a prompt and its completion take pictures"
            raise Problem(RULE, error_text, "drop the record")


def references_of(conversation: Conversation) -> list[str]:
    """Return the references of all pictures of a conversation, in order."""
    references: list[str] = []
    for message in conversation.messages:
        references += [part["image"] for part in _picture_parts(message)]
    return references


def has_pictures(message: Message) -> bool:
    """Return whether a message has a picture."""
    return bool(_picture_parts(message))


def shows_pictures(record: NormalRecord) -> bool:
    """Return whether a record has a picture."""
    return any(map(has_pictures, messages_of(record)))


def locate_pictures(record: NormalRecord, folder: Path | None) -> None:
    """Replace the paths of pictures in a record in the normal form by those of files in `folder`.

    Raises:
        Problem: a path leaves the folder, or a reference is to be fetched from a network.
    """
    for message in messages_of(record):
        for part in _picture_parts(message):
            part["image"] = located_path(part["image"], folder)


def located_pictures(conversation: Conversation, pictures: Sequence[str], folder: Path | None) -> Conversation:
    """Put the pictures of a column in their places, and find the files of all; see `with_pictures` and `locate_pictures`."""
    conversation = with_pictures(conversation, pictures)
    locate_pictures(conversation, folder)
    return conversation


def located_path(reference: str, folder: Path | None, kind: str = "picture", rule: str = RULE) -> str:
    """Return the path of the file of a picture, or of sound, or its data URL unchanged.

    Args:
        reference: the reference in the record.
        folder: the folder of the records; None if they are from no folder, and have data URLs only.
        kind: what the file holds, for messages.
        rule: the rule that a reference breaks.
    """
    if reference.startswith("data:"):
        return reference
    scheme, separator, rest = reference.partition("://")
    if separator and scheme == "file":
        reference = urllib.parse.unquote(rest)
    elif separator:
        raise Problem(
            rule, f"the {kind} {brief(reference)} is a URL, and nothing is fetched", "download it into the folder of the records"
        )
    if folder is None:
        message = f"the {kind} {brief(reference)} is a path, and these records are from no folder"
        raise Problem(rule, message, "write it as a data URL")
    root = folder.resolve()
    try:
        file = (root / reference).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, or a NUL
        raise Problem(rule, f"the {kind} {brief(reference)} is no path: {error}", "name a file, or write a data URL") from error
    if not file.is_relative_to(root):
        message = f"the {kind} {brief(reference)} is outside of {folder}, the folder of its records"
        raise Problem(rule, message, "move it there: records name only files beside them or below")
    return str(file)
