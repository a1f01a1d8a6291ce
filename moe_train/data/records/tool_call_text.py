"""Calls that are written into texts as Hermes does: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

They are read as calls only where a record is clearly of that form: it has tools, no call in another spelling, and no system
text that asks for the tags. Otherwise a text stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from moe_train.data.records.json_parser import parse_strictly
from moe_train.data.records.normal_form import Message, joined_texts
from moe_train.data.records.problem import Problem
from moe_train.data.records.tool_calls import CallIds, read_calls
from moe_train.data.records.tools import TOOL_COLUMNS
from moe_train.data.records.unread import Unread

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
# The marks of other models and data sets: glaive's <functioncall>, Llama's <function=…> and <|python_tag|>, Anthropic's
# <invoke …>, DeepSeek's <｜tool▁calls▁begin｜>, Kimi's <|tool_calls_section_begin|>, MiniMax's <minimax:tool_call>, InternLM's
# <|action_start|>.
_OTHER_CALL = re.compile(
    r"<[|｜]?(?:\w+:)?(?:start[_▁])?(?:tool|function)[_▁]?(?:calls?|uses?)(?:[_▁]\w+)?[|｜]?>"
    r"|<[|｜](?:python_tag|action_start)[|｜]>|<function[=.]|<invoke[ >]",
    re.IGNORECASE,
)
_ACTION = re.compile(r"^Action: *(\S+) *$\s*^Action Input:", re.MULTILINE)
_PYTHON_CALL = re.compile(r"\s*\[?\s*([\w.]+)\(.*\)\s*\]?\s*", re.DOTALL)
_MAY_BE_JSON = re.compile(r"\s*(?:```(?:json)?\s*)?[\[{]")
_FENCE = re.compile(r"^\s*```(?:json)?|```\s*$")
_IGNORE_TOOLS = " or ".join(f"--ignore {column}" for column in TOOL_COLUMNS)
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
        _refuse_other_calls(messages, {tool["function"]["name"] for tool in tools})
        return messages
    # Converted, the calls would be in another form than the one that the system text asks for.
    if any(message.get("role") == "system" and "<tool" in str(message.get("content")) for message in messages):
        what = f"message {written[0]} has a call as text, as its system text asks, and the record has tools beside that"
        remedy = (
            f"leave the tools out, which the system text has: {_IGNORE_TOOLS}; or write tool_calls, and a system text without tools"
        )
        raise Problem("call-text", what, remedy)
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


def _refuse_other_calls(messages: list[Message], names: Collection[str]) -> None:
    """Raise Problem if a text of the assistant has a call in a form that is not read, while the record has tools.

    Args:
        messages: The conversation.
        names: The names of its tools.
    """
    # Where the user or the system text speaks of the mark, the answer may be about it.
    asked = "".join(str(message.get("content")) for message in messages if message.get("role") in ("system", "user"))
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        text = joined_texts(message) or ""
        mark = _OTHER_CALL.search(text)
        what = None
        if mark is not None and mark[0] not in asked:
            what = f"message {i} has {mark[0]} in its text"
        elif (name := _called(text, names)) is not None:
            what = f"message {i} is a call of {name} as text"
        if what is not None:
            remedy = f"write the calls as tool_calls, or leave the tools out: {_IGNORE_TOOLS}"
            raise Problem("call-text", f"{what}, and the record has tools beside that", remedy)


def _called(text: str, names: Collection[str]) -> str | None:
    """Return the tool that a text calls and does nothing else; None if it does not.

    The forms are Llama's {"name": …, "parameters": {…}} and [name(…)], and ReAct's `Action: name`.
    """
    action = _ACTION.search(text)
    if action is not None and action[1] in names:
        return action[1]
    python = _PYTHON_CALL.fullmatch(text)
    if python is not None and python[1] in names:
        return python[1]
    if not _MAY_BE_JSON.match(text):
        return None
    try:
        value = parse_strictly(_FENCE.sub("", text).strip())
    except ValueError:
        return None
    call = value[0] if isinstance(value, list) and value else value
    if isinstance(call, dict) and not call.keys().isdisjoint(("arguments", "parameters")):
        name = call.get("name")
        return name if isinstance(name, str) and name in names else None
    return None


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
