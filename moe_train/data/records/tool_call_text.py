"""Calls that are written into texts as Hermes does: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

They are read as calls only where a record is clearly of that form: it has tools, no call in another spelling, and no system
text that asks for the tags. Otherwise a text stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

from moe_train.data.records.normal_form import Message, joined_texts
from moe_train.data.records.problem import Problem
from moe_train.data.records.tool_calls import CallIds, read_calls
from moe_train.data.records.unread import Unread

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
# The marks of other models and data sets: glaive's <functioncall>, Llama's <function=…> and <|python_tag|>.
_OTHER_CALL = re.compile(r"<\|?(?:tool_?calls?|function_?calls?|python_tag)\|?>|<function[=.]", re.IGNORECASE)
_REMEDY = "write them as tool_calls, or drop the record"


def read_tool_call_text(messages: list[Message], tools: list[dict[str, Any]], unread: Unread) -> list[Message]:
    """Convert calls and results in the texts of a conversation to the normal form.

    Raises:
        Problem: If the record has tools, and calls in texts that cannot be read as calls.
    """
    if not tools or any("tool_calls" in message for message in messages):
        return messages
    written = [i for i, message in enumerate(messages) if _has_call_text(message)]
    if not written:
        _refuse_other_calls(messages)
        return messages
    # Converted, the calls would be in another form than the one that the system text asks for.
    if any(message.get("role") == "system" and "<tool" in str(message.get("content")) for message in messages):
        what = f"message {written[0]} has a call as text, as its system text asks, and the record has tools beside that"
        raise Problem("call-text", what, "write tool_calls and a system text without tools, or drop the record")
    ids = CallIds()
    converted: list[Message] = []
    for i, message in enumerate(messages):
        if i in written:
            converted.append(_calling(message, i, ids, unread))
            ids.add(converted[-1])
            continue
        for result in _results(message):
            answered = ids.unanswered() if result["role"] == "tool" and "tool_call_id" not in result else None
            if answered is not None:
                result = result | {"tool_call_id": answered}
            ids.add(result)
            converted.append(result)
    return converted


def _refuse_other_calls(messages: list[Message]) -> None:
    """Raise Problem if a text of the assistant has a call in a form that is not read, while the record has tools."""
    # Where the user or the system text speaks of the mark, the answer may be about it.
    asked = "".join(str(message.get("content")) for message in messages if message.get("role") in ("system", "user"))
    for i, message in enumerate(messages):
        mark = _OTHER_CALL.search(joined_texts(message) or "")
        if message.get("role") == "assistant" and mark is not None and mark[0] not in asked:
            what = f"message {i} has {mark[0]} in its text, and the record has tools beside that"
            remedy = "write the calls as tool_calls, or leave the tools out by their column: --ignore tools, or --ignore functions"
            raise Problem("call-text", what, remedy)


def _has_call_text(message: Message) -> bool:
    """Return whether a message is the assistant's, and has a call in its text."""
    return message.get("role") == "assistant" and "<tool_call>" in (joined_texts(message) or "")


def _calling(message: Message, i: int, ids: CallIds, unread: Unread) -> Message:
    """Convert a message with calls in its text."""
    text = joined_texts(message) or ""
    calls = _CALL.findall(text)
    before, _, _ = text.partition("<tool_call>")
    # Text after a call has no place in the normal form, where calls follow the content.
    if len(calls) != text.count("<tool_call>") or _CALL.sub("", text).strip() != before.strip():
        raise Problem("call-text", f"message {i} has <tool_call> in its text, and more text after it or no end", _REMEDY)
    read: list[dict[str, Any]] = []
    for call in calls:
        read += read_calls(call, f"message {i}", unread)
    content = {"content": before.strip()} if before.strip() else {}
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"role": "assistant", **content, "tool_calls": ids.numbered(read), **rest}


def _results(message: Message) -> list[Message]:
    """Divide a message with results in tags into one message for each; any other message stays as it is."""
    content = joined_texts(message)
    if message.get("role") != "tool" or content is None:
        return [message]
    # Several results may share one message, whereas the normal form has a message for each call.
    results = _RESULT.findall(content)
    if not results or _RESULT.sub("", content).strip():
        return [message]
    return [message | {"content": result} for result in results]
