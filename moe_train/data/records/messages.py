"""Lists of messages: OpenAI's and Mistral's {role, content}, ShareGPT's {from, value}, as a list or as JSON text."""

from __future__ import annotations

import itertools
from typing import Any

from moe_train import config
from moe_train.data.records.content import Content, normal_content, read_parts, take_reasoning
from moe_train.data.records.flags import FlaggedPiece, loss_of, take_detail, take_flag
from moe_train.data.records.meaning import MESSAGE, OTHER_TEXT, lost_meaning
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tool_calls import CallIds, read_calls
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import Unread, is_empty

_SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system",
    "observation": "tool", "tool_response": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
"""Names of roles in ShareGPT, LLaMA-Factory, ms-swift, Gemini and OpenAI that mean one of ours."""
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages whose content is a call of the assistant."""
MESSAGE_COLUMNS = ("messages", "interactions", "conversations", "conversation")
"""Columns of a record that may hold messages."""
_KEYS_BY_ROLE = {
    "system": "system", "human": "user", "user": "user", "input": "user", "assistant": "assistant", "output": "assistant",
}  # fmt: skip
"""Keys of entries such as ms-swift's {human, assistant} and XTuner's {system, input, output}, and the roles of their texts.

They stand in the order in which they are said.
"""
PLAIN = config.ChatRecord(name="chat")
"""The section of messages in the usual spelling."""
_REMEDY = "write one object with role and content for each turn"


def read_messages(value: Any, column: str, record: config.ChatRecord, unread: Unread) -> list[Message]:
    """Convert a list of messages of any supported spelling to the normal form.

    Args:
        value: The list, or its JSON text.
        column: The column that it stands in, for a message.
        record: The section that names the keys of a message.
        unread: Takes the keys that are not read.

    Raises:
        Problem: If a message cannot be interpreted.
    """
    # Columnar files and CSV often hold the list as JSON text.
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = json_value(value, column, _REMEDY)
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, dict):
        value = _rows_of_columns(value)
    names_keys = record.role != "role" or record.content != "content"
    if isinstance(value, list) and value and not names_keys and all(map(_is_keyed_by_role, value)):
        value = list(itertools.chain.from_iterable(map(_by_role, value)))
    if not isinstance(value, list) or not value:
        raise Problem("type", f"{column} should be a list with at least one message, not {brief(value)}", _REMEDY)
    messages: list[Message] = []
    # Renamed keys or roles, and ignored keys, need the slow path, where all of them are looked at.
    plain = not names_keys and not record.roles and not unread.ignore
    ids: CallIds | None = None
    for i, entry in enumerate(value):
        if plain and _is_plain(entry):
            messages.append(entry)  # the fast path for almost all messages
            continue
        if not isinstance(entry, dict):
            message = f"message {i} should be an object with role and content, not {brief(entry)}"
            raise Problem("type", message, 'write {"role": …, "content": …}')
        # Created late, as most conversations take the fast path only and have no calls.
        if ids is None:
            ids = CallIds()
        remaining = unread.opened(MESSAGE, entry)
        read = _message(remaining, i, record, ids, unread)
        _check_keys(entry, read[-1], remaining, i, record)
        unread.close(f"message {i}", MESSAGE, remaining)
        messages += read
        if _continues_call(value, i, messages):
            messages[-2]["tool_calls"] += messages.pop()["tool_calls"]
    return messages


def _rows_of_columns(value: dict[str, Any]) -> Any:
    """Return the messages of an object of columns of equal length, which is how `datasets` stores `Sequence({role, content})`."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, list | tuple) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _check_keys(entry: dict[str, Any], message: Message, remaining: dict[str, Any], i: int, record: config.ChatRecord) -> None:
    """Raise Problem if a message lacks the key of its role or content, and has others that are not read, which may hold it.

    Args:
        entry: The message as it is written.
        message: The message in the normal form.
        remaining: The keys that were not read.
        i: The number of the message.
        record: The section that names the keys of a message.
    """
    missing: list[str] = []
    if record.role not in entry and "role" not in message:
        missing.append("role")
    if record.content not in entry and "content" not in message and "tool_calls" not in message:
        missing.append("content")
    # If all keys have a meaning of their own, they are refused for that.
    if missing and any(lost_meaning(MESSAGE, str(key)) in (None, OTHER_TEXT) for key in remaining):
        absent = " and no ".join(missing)
        settings = " and ".join(f"{setting}: KEY" for setting in missing)
        remedy = f"rename the key that holds it, or name it in a config: {settings} in the record section"
        raise Problem("columns", f"message {i} has no {absent}; it has {brief(', '.join(map(str, remaining)))}", remedy)


def _is_keyed_by_role(entry: Any) -> bool:
    """Return whether an entry holds texts under the names of those who say them, as ms-swift's {human, assistant} does."""
    # By its class first, which spares almost all messages the rest.
    if not isinstance(entry, dict) or "role" in entry or "from" in entry:
        return False
    return bool(entry) and entry.keys() <= _KEYS_BY_ROLE.keys() and all(isinstance(text, str) for text in entry.values())


def _by_role(entry: dict[str, str]) -> list[Message]:
    """Return the messages of an entry that holds texts under the names of those who say them."""
    return [{"role": role, "content": entry[key]} for key, role in _KEYS_BY_ROLE.items() if key in entry]


def _continues_call(entries: list[Any], i: int, messages: list[Message]) -> bool:
    """Return whether entry `i`, read as the last message, is one more of the parallel calls of the message before."""
    # Spellings that write a call as a message of its own write parallel calls as several messages.
    for entry in entries[max(i - 1, 0) : i + 1]:
        if entry.get("from", entry.get("role")) not in _CALL_ROLES:
            return False
    if i == 0 or messages[-1].keys() - {"role", "tool_calls", "weight"}:
        return False
    return messages[-1].get("weight") == messages[-2].get("weight")


def _is_plain(entry: Any) -> bool:
    """Return whether an entry is already in the normal form, with only a role and a content."""
    if entry.__class__ is not dict or len(entry) != 2 or not isinstance(entry.get("content"), str):
        return False
    return entry.get("role") in ("user", "assistant", "system")


def _message(remaining: dict[str, Any], i: int, record: config.ChatRecord, ids: CallIds, unread: Unread) -> list[Message]:
    """Convert a message; what is read is taken out of `remaining`.

    Returns:
        The message, after the results that stand in it.
    """
    location = f"message {i}"
    # ShareGPT states no ids in results, whatever its calls have.
    states_ids = record.role in remaining
    speaker = _take_speaker(remaining, record)
    role = _our_role(speaker)
    content = _take_content(remaining, record, location)
    calls: list[dict[str, Any]] = []
    if speaker in _CALL_ROLES:
        calls = ids.numbered(read_calls(content, location, unread))
        content = None
    detail = take_detail(remaining, location, role, content)
    if not detail and isinstance(content, str):
        detail = [FlaggedPiece(content, None)]
    parts = Content(content, [detail], [], [], [])
    if isinstance(content, list | tuple):
        parts = read_parts(list(content), location, role, unread)
    flag = take_flag(remaining, location, role)
    reasoning = take_reasoning(remaining, location, role)
    separate_calls = _calls(remaining, location, ids, unread)
    calls += ids.numbered(parts.calls) + separate_calls
    if remaining.get("prefix") is False:  # the default of Mistral's API
        del remaining["prefix"]
    message = {} if role is None else {"role": role}
    texts, content = _with_reasoning(reasoning, parts, location)
    loss = loss_of(location, flag, texts, [*parts.call_flags, *(None for _ in separate_calls)])
    # APIs write an empty text or null beside calls; both become no content, so that they are tokenized alike.
    if content is not None and not (content == "" and calls):
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if loss.flag is not None:
        message["weight"] = loss.flag
    if loss.pieces:
        message["pieces"] = loss.pieces
    if role == "tool":
        name = remaining.get("name")
        message |= {key: remaining.pop(key) for key in ("tool_call_id", "name") if key in remaining}
        answered = ids.unanswered(name if isinstance(name, str) else None, by_number=states_ids and speaker == "tool")
        if "tool_call_id" not in message and answered is not None:
            message["tool_call_id"] = answered
    messages = [*parts.results, message]
    if parts.results and "content" not in message and "tool_calls" not in message:
        messages = parts.results  # Anthropic's user messages may hold nothing but results
    # In order: a result must be noted before the calls after it, so that the next result answers the right call.
    for read in messages:
        ids.add(read)
    return messages


def _take_speaker(remaining: dict[str, Any], record: config.ChatRecord) -> Any:
    """Take the role out of a message as it is written, in `role` or ShareGPT's `from`, or as the section names it."""
    # Decided for each message, since a list may mix both spellings.
    key = record.role if record.role in remaining or "from" not in remaining else "from"
    speaker = remaining.pop(key, None)
    # What the section says of a name comes before what it usually means.
    if isinstance(speaker, str):
        speaker = record.roles.get(speaker, speaker)
    if "from" in remaining and _our_role(remaining["from"]) == _our_role(speaker):
        del remaining["from"]  # the same in both spellings
    return speaker


def _our_role(speaker: Any) -> Any:
    """Return our name for a role; an unknown one stays as it is."""
    if not isinstance(speaker, str):
        return speaker
    return "assistant" if speaker in _CALL_ROLES else _SPEAKERS.get(speaker, speaker)


def _take_content(remaining: dict[str, Any], record: config.ChatRecord, location: str) -> Any:
    """Take the content out of a message, from `content` or ShareGPT's `value`."""
    content = remaining.pop(record.content, None)
    value = remaining.pop("value", None)
    if content is not None and not is_empty(value) and value != content:
        raise Problem("columns", f"{location} has both {record.content} and value", "keep the one that is meant")
    return value if content is None else content


def _with_reasoning(reasoning: list[list[FlaggedPiece]], parts: Content, location: str) -> tuple[list[list[FlaggedPiece]], Any]:
    """Return the texts of a message, and its content, with the reasoning of its fields before it."""
    content = parts.content
    if not reasoning:
        return parts.pieces, content
    part = {"type": "thinking", "thinking": "".join(piece.text for piece in reasoning[0])}
    if content is None:
        return reasoning, [part]
    if isinstance(content, str):
        return [*reasoning, *parts.pieces], normal_content([part, {"type": "text", "text": content}])
    # The same text in both spellings; only that of the part can have a flag for the whole of it.
    if isinstance(content, list) and content[:1] == [part] and len(reasoning[0]) == 1 and reasoning[0][0].flag is None:
        return parts.pieces, content
    raise Problem("thinking", f"{location} has reasoning in a field and in a part of its content", "keep the one that is meant")


def _calls(remaining: dict[str, Any], location: str, ids: CallIds, unread: Unread) -> list[dict[str, Any]]:
    """Take the calls out of a message: `tool_calls`, or the old `function_call`, which has no id."""
    calls = remaining.pop("tool_calls", None)
    old = remaining.pop("function_call", None)
    # As JSON text, no calls are "[]" or "null".
    if isinstance(calls, str) and calls.strip() in ("[]", "null"):
        calls = None
    if is_empty(calls) and is_empty(old):
        return []
    if not is_empty(calls) and not is_empty(old):
        raise Problem("columns", f"{location} has both tool_calls and function_call", "keep the one that is meant")
    if not is_empty(old):
        return ids.numbered(read_calls(old, location, unread))
    return read_calls(calls, location, unread)
