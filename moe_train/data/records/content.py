"""Contents of messages: text, or a list of parts of text, reasoning, calls and results, in the spellings of several APIs."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_train.data.records.flags import FlaggedPiece, take_flag
from moe_train.data.records.meaning import PART
from moe_train.data.records.media_parts import kind_of, read_media_part
from moe_train.data.records.normal_form import JOINT, MEDIA
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tool_calls import read_calls
from moe_train.data.records.unread import Unread, is_empty

_TEXT = ("text", "input_text", "output_text")
_REASONING = ("thinking", "reasoning")
_REASONING_KEYS = ("thinking", "reasoning", "text", "value")
_CALL = ("tool_use", "tool_call", "tool_calls")
_MEDIA = ("image", "audio", "video", "file", "document")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the model's reasoning."""
_REMEDY = 'write parts as {"type": "text", "text": …} or {"type": "thinking", "thinking": …}'


class Content(NamedTuple):
    """What the parts of a message contain."""

    content: str | list[dict[str, Any]] | None
    """Text, or parts in the normal form; None if there are only calls or results."""
    pieces: list[list[FlaggedPiece]]
    """The texts of the content in order, reasoning included, with their flags."""
    call_flags: list[int | None]
    """The flag of each part that is a call."""
    calls: list[dict[str, Any]]
    results: list[dict[str, Any]]
    """Tool messages that answer calls, for the parts that are results."""


def read_parts(value: list[Any], location: str, role: object, unread: Unread) -> Content:
    """Convert the parts of a content.

    Texts with flags of their own are pieces of one text, as in axolotl, which alone has such flags.

    Args:
        value: The parts.
        location: What the message is, for a message.
        role: The role of the message.
        unread: Takes the keys that are not read.

    Raises:
        Problem: If a part is not text, reasoning, a picture, sound, a call or a result.
    """
    parts: list[dict[str, Any]] = []
    flags: list[int | None] = []
    call_flags: list[int | None] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for k, part in enumerate(value):
        part_where = f"part {k} of {location}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise Problem("type", f"{part_where} should be an object with a type, not {brief(part)}", _REMEDY)
        remaining = unread.opened(PART, part)
        flag = take_flag(remaining, part_where, role)
        # Parts without a type are text if they have one; anything else has to state its type.
        kind = remaining.pop("type", "text" if "text" in remaining else None)
        if kind in _TEXT:
            parts.append({"type": "text", "text": _text(remaining, ("text", "value"), part_where)})
            flags.append(flag)
        elif kind in _REASONING and _is_ignored(part, remaining):
            pass
        elif kind in _REASONING:
            if role in ("user", "tool"):
                raise Problem("thinking", f"{part_where} is reasoning, and the message is {role}", "leave it out")
            parts.append(_thinking(remaining, part_where))
            flags.append(flag)
        elif (media := kind_of(kind)) is not None:
            parts.append(read_media_part(remaining, media, part_where))
            flags.append(flag)
        elif kind in _CALL:
            calls += _calls(remaining, part_where, unread)
            call_flags.append(flag)
            # `_calls` has closed the part already, under the level of calls.
            remaining = {}
        elif kind == "tool_result":
            results.append(_result(remaining, part_where, unread))
        else:
            raise _not_read(kind, part_where)
        unread.close(part_where, PART, remaining)
    parts, pieces = _joined_pieces(parts, flags)
    content: str | list[dict[str, Any]] | None = normal_content(parts)
    # `messages` tells by the missing content that a message holds nothing but results.
    if content == "" and (calls or results):
        content = None
    return Content(content, pieces, call_flags, calls, results)


def _joined_pieces(parts: list[dict[str, Any]], flags: list[int | None]) -> tuple[list[dict[str, Any]], list[list[FlaggedPiece]]]:
    """Join neighbouring texts, if one of them has a flag of its own.

    Returns:
        The parts, and for each the pieces that it consists of.
    """
    pieces: list[list[FlaggedPiece]] = []
    for part, flag in zip(parts, flags, strict=True):
        # The part holds its text under the name of its type; pictures and sound have no text.
        if part["type"] not in MEDIA:
            pieces.append([FlaggedPiece(part[part["type"]], flag)])
    if len(pieces) < len(parts) and any(flag is not None for flag in flags):
        raise Problem(
            "weight",
            "a message has pictures or sound, and parts with flags for the loss",
            "leave the flags out: users' texts bear none",
        )
    if all(flag is None for part, flag in zip(parts, flags, strict=True) if part["type"] == "text"):
        return parts, pieces
    joined: list[dict[str, Any]] = []
    joined_pieces: list[list[FlaggedPiece]] = []
    for part, piece in zip(parts, pieces, strict=True):
        if joined and joined[-1]["type"] == part["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
            joined_pieces[-1] += piece
        else:
            joined.append(part)
            joined_pieces.append(piece)
    return joined, joined_pieces


def normal_content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Leave empty texts out of parts in the normal form; return a text if no more than one text remains."""
    filled = [part for part in parts if part["type"] != "text" or part["text"]]
    if not filled:
        return ""
    if len(filled) == 1 and filled[0]["type"] == "text":
        return filled[0]["text"]
    return filled


def take_reasoning(remaining: dict[str, Any], location: str, role: object) -> list[list[FlaggedPiece]]:
    """Take the reasoning out of the fields of a message.

    Returns:
        At most one text, in the pieces that have flags of their own.

    Raises:
        Problem: If two fields differ, a field is not text, or the message is not the assistant's.
    """
    fields: dict[str, list[FlaggedPiece]] = {}
    for name in REASONING_FIELDS:
        value = remaining.pop(name, None)
        pieces = [] if is_empty(value) else _reasoning_pieces(value, f"{name} of {location}", role)
        # Parts of empty texts join to the empty text, which is no reasoning.
        if "".join(piece.text for piece in pieces):
            fields[name] = pieces
    names = list(fields)
    if any(pieces != fields[names[0]] for pieces in fields.values()):
        raise Problem("thinking", f"{location} has both {names[0]} and {names[1]}, which differ", "keep the one that is meant")
    if fields and role in ("system", "user", "tool"):
        raise Problem("thinking", f"{location} is {role}, and has {names[0]}", "only the assistant reasons; leave it out")
    return list(fields.values())[:1]


def _reasoning_pieces(value: Any, location: str, role: object) -> list[FlaggedPiece]:
    """Return the reasoning in a field of a message: a text, or a list of text parts, which may have flags."""
    if not isinstance(value, list | tuple) or not all(isinstance(part, dict) for part in value):
        return [FlaggedPiece(_joined(value, location), None)]
    flagged: list[FlaggedPiece] = []
    parts: list[dict[str, Any]] = []
    for part in value:
        remaining = {key: item for key, item in part.items() if item is not None}
        flag = take_flag(remaining, f"a part of {location}", role)
        parts.append(remaining)
        flagged.append(FlaggedPiece(_joined([remaining], location), flag))
    if all(piece.flag is None for piece in flagged):
        return [FlaggedPiece(_joined(parts, location), None)]
    return flagged


def _is_ignored(part: dict[str, Any], remaining: dict[str, Any]) -> bool:
    """Return whether the key that holds the reasoning of a part is ignored by name, so that it is not left."""
    # The part had one of the keys, and `opened` took it out; without this test the part would fail for having no text.
    return any(part.get(key) is not None for key in _REASONING_KEYS) and not any(key in remaining for key in _REASONING_KEYS)


def _thinking(remaining: dict[str, Any], location: str) -> dict[str, Any]:
    """Take reasoning out of a part."""
    part: dict[str, Any] = {"type": "thinking", "thinking": _text(remaining, _REASONING_KEYS, location)}
    # False marks reasoning that was cut off; only that is kept, so that equal reasoning has one normal form.
    closed = remaining.pop("closed", True)
    if not isinstance(closed, bool):
        raise Problem("type", f"{location} has closed {brief(closed)}", "write true or false")
    return part if closed else part | {"closed": False}


def _text(remaining: dict[str, Any], keys: tuple[str, ...], location: str) -> str:
    """Take the text out of a part, from the only one of some keys that it has."""
    present = [key for key in keys if key in remaining]
    if len(present) != 1:
        found = " and ".join(present) or "no text"
        raise Problem("type", f"{location} has {found}, and should have one text", _REMEDY)
    return _joined(remaining.pop(present[0]), location)


def _joined(value: Any, location: str) -> str:
    """Return a text, or the joined texts of a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(_is_text_part(part) for part in value):
        return JOINT.join(part["text"] for part in value if part["text"])
    raise Problem("type", f"{location} should be text, not {brief(value)}", _REMEDY)


def _is_text_part(part: Any) -> bool:
    """Return whether a value is {type: text, text} and nothing else."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2


def _calls(remaining: dict[str, Any], location: str, unread: Unread) -> list[dict[str, Any]]:
    """Convert a part that is a call: Anthropic's {id, name, input}, or LLaMA-Factory's with the call as JSON text in `value`."""
    value = remaining.pop("value", None)
    if value is None:
        return read_calls([remaining], location, unread)
    unread.close(location, PART, remaining)
    return read_calls(value, location, unread)


def _result(remaining: dict[str, Any], location: str, unread: Unread) -> dict[str, Any]:
    """Convert a part that is a result: Anthropic's {tool_use_id, content}."""
    message: dict[str, Any] = {"role": "tool"}
    if "tool_use_id" in remaining:
        message["tool_call_id"] = remaining.pop("tool_use_id")
    value = remaining.pop("content", "")
    if isinstance(value, list | tuple):
        inner = read_parts(list(value), location, "tool", unread)
        if inner.content is None:
            raise Problem("type", f"{location} should be a result of text, not {brief(value)}", _REMEDY)
        value = inner.content
    message["content"] = value
    return message


def _not_read(kind: Any, location: str) -> Problem:
    """Return the problem for a part of a type that is not read."""
    # By substring, since the types differ between APIs: image, image_url, input_image, video_url.
    if isinstance(kind, str) and any(word in kind for word in _MEDIA):
        return Problem("unread-key", f"{location} is of type {brief(kind)}: video and documents are not read", "drop the record")
    if kind == "redacted_thinking":
        return Problem("thinking", f"{location} is reasoning that is encrypted, and cannot be read", "drop the part or the record")
    return Problem("type", f"{location} is of type {brief(kind)}, which is not read", _REMEDY)
