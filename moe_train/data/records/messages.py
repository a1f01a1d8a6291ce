"""Lists of messages: OpenAI's and Mistral's {role, content}, ShareGPT's {from, value}, as a list or as JSON text."""

from __future__ import annotations

from typing import Any

from moe_train import config
from moe_train.data.records.content import Content, normal_content, read_parts, take_reasoning
from moe_train.data.records.flags import common_flag, take_flag
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tool_calls import CallIds, read_calls
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import MESSAGE, Unread, is_empty

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "function_call", "observation": "tool", "tool": "tool",
}  # fmt: skip
MESSAGE_COLUMNS = ("messages", "interactions", "conversations")
"""Columns of a record that may hold messages."""
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
    if not isinstance(value, list) or not value:
        raise Problem("type", f"{column} should be a list with at least one message, not {brief(value)}", _REMEDY)
    messages: list[Message] = []
    # Renamed keys or roles, and ignored keys, need the slow path, where all of them are looked at.
    plain = record.role == "role" and record.content == "content" and not record.roles and not unread.ignore
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
        # Decided for each message, since a list may mix both spellings.
        if record.role not in remaining and "from" in remaining:
            read = _sharegpt(remaining, i, ids, unread)
        else:
            read = _message(remaining, i, record, ids, unread)
        unread.close(f"message {i}", MESSAGE, remaining)
        messages += read
    return messages


def _is_plain(entry: Any) -> bool:
    """Return whether an entry is already in the normal form, with only a role and a content."""
    if entry.__class__ is not dict or len(entry) != 2 or not isinstance(entry.get("content"), str):
        return False
    role = entry.get("role")
    # The role "function" is renamed to tool and given the id of the call that it answers.
    return role is not None and role != "function"


def _message(remaining: dict[str, Any], i: int, record: config.ChatRecord, ids: CallIds, unread: Unread) -> list[Message]:
    """Convert a message with `role` and `content`, or the keys that `record` names; what is read is taken out of `remaining`."""
    location = f"message {i}"
    role = remaining.pop(record.role, None)
    role = record.roles.get(role, role) if isinstance(role, str) else role
    content = remaining.pop(record.content, None)
    if role == "function":  # OpenAI's old spelling of a result, which names the function and has no id
        name = remaining.get("name")
        answered = ids.unanswered(name if isinstance(name, str) else None)
        remaining |= {} if answered is None or "tool_call_id" in remaining else {"tool_call_id": answered}
        role = "tool"
    parts = Content(content, [], [], [])
    if isinstance(content, list | tuple):
        parts = read_parts(list(content), location, role, unread)
    flag = common_flag(location, take_flag(remaining, location, role), parts.flags)
    reasoning = take_reasoning(remaining, location, role)
    calls = parts.calls + _calls(remaining, location, ids, unread)
    # `value` is ShareGPT's content, so it would be text of the turn that is lost.
    if not is_empty(remaining.get("value")):
        raise Problem("columns", f"{location} has both {record.content} and value", "keep the one that is meant")
    if remaining.get("prefix") is False:  # the default of Mistral's API
        del remaining["prefix"]
    message = {} if role is None else {"role": role}
    content = _with_reasoning(reasoning, parts.content, location)
    # APIs write an empty text or null beside calls; both become no content, so that they are tokenized alike.
    if content is not None and not (content == "" and calls):
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if flag is not None:
        message["weight"] = flag
    if role == "tool":
        message |= {key: remaining.pop(key) for key in ("tool_call_id", "name") if key in remaining}
    messages = [*parts.results, message]
    if parts.results and "content" not in message and "tool_calls" not in message:
        messages = parts.results  # Anthropic's user messages may hold nothing but results
    # In order: a result must be noted before the calls after it, so that the next result answers the right call.
    for read in messages:
        ids.add(read)
    return messages


def _with_reasoning(reasoning: list[dict[str, Any]], content: Any, location: str) -> Any:
    """Return a content with the reasoning of the message's fields before it."""
    if not reasoning:
        return content
    if content is None:
        return reasoning
    if isinstance(content, str):
        return normal_content([*reasoning, {"type": "text", "text": content}])
    if isinstance(content, list) and content[: len(reasoning)] == reasoning:
        return content  # the same text in both spellings
    raise Problem("thinking", f"{location} has reasoning in a field and in a part of its content", "keep the one that is meant")


def _calls(remaining: dict[str, Any], location: str, ids: CallIds, unread: Unread) -> list[dict[str, Any]]:
    """Take the calls out of a message: `tool_calls`, or the old `function_call`, which has no id."""
    calls = remaining.pop("tool_calls", None)
    old = remaining.pop("function_call", None)
    if is_empty(calls) and is_empty(old):
        return []
    if not is_empty(calls) and not is_empty(old):
        raise Problem("columns", f"{location} has both tool_calls and function_call", "keep the one that is meant")
    if not is_empty(old):
        return ids.numbered(read_calls(old, location, unread))
    if not isinstance(calls, list | tuple | str):
        raise Problem("type", f"tool_calls should be a list, not {brief(calls)}", "write a list of calls")
    return read_calls(calls, location, unread)


def _sharegpt(remaining: dict[str, Any], i: int, ids: CallIds, unread: Unread) -> list[Message]:
    """Convert a ShareGPT message to the normal form; what is read is taken out of `remaining`.

    ShareGPT has no call ids: calls are numbered, and a result answers the first call that has none yet.
    """
    location = f"message {i}"
    speaker = remaining.pop("from")
    value = remaining.pop("value", None)
    role = _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    # Parts in place of text: the same as a message with role and content, but for the names of the keys.
    if isinstance(value, list) and role != "function_call":
        remaining |= {"role": role, "content": value}
        return _message(remaining, i, PLAIN, ids, unread)
    # A function_call is the assistant's own turn, so it may bear a loss.
    flag = take_flag(remaining, location, "assistant" if role == "function_call" else role)
    reasoning = take_reasoning(remaining, location, role)
    weight = {} if flag is None else {"weight": flag}
    message: Message
    if role == "function_call":
        calls = ids.numbered(read_calls(value, location, unread))
        content = {"content": reasoning} if reasoning else {}
        message = {"role": "assistant", **content, "tool_calls": calls, **weight}
    else:
        content = _with_reasoning(reasoning, value, location)
        message = {"role": role, **({} if content is None else {"content": content}), **weight}
        answered = ids.unanswered() if role == "tool" else None
        if answered is not None:
            message["tool_call_id"] = answered
    ids.add(message)
    return [message]
