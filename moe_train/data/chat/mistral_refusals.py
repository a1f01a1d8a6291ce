"""Problems for what mistral-common refuses: the message at fault, the cause, and a remedy, in place of the library's own words.

`data check` finds most of these faults by rules of its own; training meets them here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from pydantic import ValidationError

from moe_train.data.chat.example import turns
from moe_train.data.records.normal_form import Conversation, Message, texts_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.mistral import Mistral

_FUNCTION = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NINE = re.compile(r"[a-zA-Z0-9]{9}")


class _Refusal(NamedTuple):
    """A refusal of mistral-common."""

    words: str
    """A pattern that its message matches."""
    rule: str
    fault: Callable[[Conversation], str | None]
    """Names the place at fault; None if there is no such place, so that another refusal of the same words applies."""
    remedy: str


def refusal(error: Exception, conversation: Conversation, tokenizer: Mistral) -> Problem:
    """Return the problem for an exception that mistral-common raised for a conversation."""
    name = f"{tokenizer.files[0].name} (version {tokenizer.finetuning.version.value})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        rule = "settings" if place.startswith(("response_format", "reasoning_effort")) else "type"
        reason = first["msg"].removeprefix("Value error, ")
        return Problem(rule, f"{place} of the record is not accepted: {reason}", f"correct {place}, or drop the record")
    words = " ".join(str(error).split())
    for entry in _REFUSALS:
        if re.search(entry.words, words):
            fault = entry.fault(conversation)
            if fault is not None:
                return Problem(entry.rule, f"{fault}, which {name} does not write", entry.remedy)
    schema = re.match(r"Invalid tool schema: (.*)", words)
    if schema:
        return Problem("tool-schema", f"the parameters of a tool are no JSON schema: {brief(schema[1])}", "correct the schema")
    # The words of another version of mistral-common may differ, but hardly what it refuses.
    for entry in _REFUSALS:
        fault = entry.fault(conversation)
        if fault is not None:
            return Problem(entry.rule, f"{fault}, which {name} does not write ({words})", entry.remedy)
    return Problem("refused", f"mistral-common refuses the record: {words}", "change or drop the record")


# --- the places at fault -----------------------------------------------------------------------------------------


def _text_beside_calls(conversation: Conversation) -> str | None:
    """Name the first turn with text beside calls, which versions before v7 do not write."""
    messages = conversation.messages
    for turn in turns(messages):
        members = range(turn.start, turn.end)
        calling = [i for i in members if messages[i].get("tool_calls")]
        # mistral-common joins the messages of a turn.
        speaking = [i for i in members if _has_text(messages[i])]
        if calling and speaking:
            joined = "" if speaking[0] in calling else f" of message {calling[0]}, which is one turn with it"
            return f"message {speaking[0]} has text beside the calls{joined}"
    return None


def _nothing_said(conversation: Conversation) -> str | None:
    """Name the first message of the assistant without text or calls."""
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and not _has_text(message) and not message.get("tool_calls"):
            return f"message {i} is a turn of the assistant without text or calls"
    return None


def _has_text(message: Message) -> bool:
    """Return whether a message has text."""
    return any(texts_of(message))


def _function_name(conversation: Conversation) -> str | None:
    """Name the first function whose name mistral-common does not accept."""
    names = [(f"tool {i} is named", tool["function"]["name"]) for i, tool in enumerate(conversation.tools)]
    for i, message in enumerate(conversation.messages):
        names += [(f"message {i} calls", call["function"]["name"]) for call in message.get("tool_calls", ())]
        if message["role"] == "tool" and "name" in message:
            names.append((f"message {i} is a result of", message["name"]))
    for place, name in names:
        if not _FUNCTION.fullmatch(name):
            return f"{place} {brief(name)}"
    return None


def _call_id(conversation: Conversation) -> str | None:
    """Name the first call or result whose id has not nine characters."""
    last = len(conversation.messages) - 1
    for i, message in enumerate(conversation.messages):
        for call in message.get("tool_calls", ()):
            # Nothing answers the calls of the last message, so that they need no id.
            if ("id" in call or i < last) and not _NINE.fullmatch(call.get("id", "")):
                return f"message {i} calls {call['function']['name']} with the id {brief(call.get('id'))}"
        if message["role"] == "tool" and not _NINE.fullmatch(message.get("tool_call_id", "")):
            return f"message {i} is a result with the tool_call_id {brief(message.get('tool_call_id'))}"
    return None


def _unanswered(conversation: Conversation) -> str | None:
    """Name the first message whose calls and results have different ids."""
    messages = conversation.messages
    for i, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        ids = [call.get("id") for call in message.get("tool_calls", ())]
        results = [result.get("tool_call_id") for result in _results(messages, i)]
        if sorted(map(str, ids)) != sorted(map(str, results)):
            return f"message {i} has {len(ids)} calls ({_listed(ids)}) and {len(results)} results ({_listed(results)})"
    return None


def _repeated_id(conversation: Conversation) -> str | None:
    """Name the first message with two calls of one id."""
    for i, message in enumerate(conversation.messages):
        ids = [call.get("id") for call in message.get("tool_calls", ())]
        for name in ids:
            if ids.count(name) > 1:
                return f"message {i} has {ids.count(name)} calls with the id {brief(name)}"
    return None


def _several_results(conversation: Conversation) -> str | None:
    """Name the first message whose calls have several results."""
    for i, message in enumerate(conversation.messages):
        count = len(_results(conversation.messages, i))
        if message.get("tool_calls") and count > 1:
            return f"message {i} has {count} results"
    return None


def _results(messages: list[Message], i: int) -> list[Message]:
    """Return the results right after message `i`."""
    results = []
    for message in messages[i + 1 :]:
        if message["role"] != "tool":
            break
        results.append(message)
    return results


def _listed(ids: list[str | None]) -> str:
    """Format ids for a message."""
    return ", ".join(map(str, ids)) or "none"


_FOLLOWERS = {"system": "user, assistant or system", "user": "assistant, system or user"}
_FOLLOWERS |= {"assistant": "assistant, user or tool", "tool": "assistant, tool or user"}


def _role_order(conversation: Conversation) -> str | None:
    """Name the first message whose role may not follow the one before it."""
    messages = conversation.messages
    if messages and messages[0]["role"] not in ("user", "system"):
        return f"message 0 is {messages[0]['role']}, where user or system should be"
    for i in range(1, len(messages)):
        before = messages[i - 1]["role"]
        if messages[i]["role"] not in _FOLLOWERS.get(before, ""):
            return f"message {i} is {messages[i]['role']} after {before}, where {_FOLLOWERS[before]} should be"
    return None


_REFUSALS = (
    _Refusal(
        "either content or tool_calls|[Tt]ool calls and content",
        "text-and-call",
        _text_beside_calls,
        "leave the text out, or use a tokenizer of version v7, v11, v13 or v15",
    ),
    _Refusal(
        "either content or tool_calls|Invalid assistant message",
        "empty-assistant",
        _nothing_said,
        "write the answer, or cut the conversation before it",
    ),
    _Refusal("Function name was", "function-name", _function_name, "a name has 1 to 64 of a-z, A-Z, 0-9, _ and -"),
    _Refusal(
        "Tool call id",
        "call-id",
        _call_id,
        "an id has 9 of a-z, A-Z, 0-9, the same at the call and its result; moe-train data check FILES --fix OUT writes such ids",
    ),
    _Refusal(
        "number of function calls|tool responses|tool call id",
        "call-result",
        _unanswered,
        "each call is followed by one tool message with its id as tool_call_id",
    ),
    _Refusal("Duplicate tool call id", "call-id", _repeated_id, "give each call of a message an id of its own"),
    _Refusal(
        "multiple tool results",
        "call-result",
        _several_results,
        "make one call a turn, or use a tokenizer of version v3 or later",
    ),
    _Refusal(
        "Unexpected role|must start with|number of function calls|tool responses|tool call id",
        "role-order",
        _role_order,
        "after an optional system message, user and assistant take turns, and results follow calls",
    ),
)
"""In this order: the first whose words and place fit."""
