"""Rules for tool calls: names, arguments and ids, and one result for each call.

A rule yields a message for each place that breaks it. Its `fix_…` edits the conversation in place where only one correction
is right, and yields what it changed.
"""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Iterator

from moe_train.data.check.requirements import Requirements
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import brief
from moe_train.machine.files import JsonObject

_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_FUNCTION = re.compile(r"[a-zA-Z0-9_-]{1,64}")

ToolCall = JsonObject
"""A call in the normal form: {id, type, function: {name, arguments}}."""


def _calls(conversation: Conversation) -> Iterator[tuple[int, ToolCall, bool]]:
    """Yield (message index, call, whether it is in the last message, which nothing answers)."""
    last = len(conversation.messages) - 1
    for i, message in enumerate(conversation.messages):
        for call in message.get("tool_calls", ()):
            yield i, call, i == last


def caller(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find calls in messages that are not the assistant's."""
    for i, message in enumerate(conversation.messages):
        if "tool_calls" in message and message["role"] != "assistant":
            yield f"message {i} is {message['role']}, and has tool_calls"


def function_name(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find names of functions that are not 1 to 64 of a-z, A-Z, 0-9, _ and -."""
    for i, call, _ in _calls(conversation):
        if not _FUNCTION.fullmatch(call["function"]["name"]):
            yield f"message {i} calls {brief(call['function']['name'])}"
    for i, tool in enumerate(conversation.tools):
        if not _FUNCTION.fullmatch(tool["function"]["name"]):
            yield f"tool {i} is named {brief(tool['function']['name'])}"


def call_id(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find calls without an id, or with an id that the tokenizer's format does not allow."""
    for i, call, is_last in _calls(conversation):
        name = call.get("id")
        if name is None and is_last:
            continue  # nothing answers the last message, so no id is needed
        if not name:
            yield f"message {i} calls {call['function']['name']} without an id"
        elif form.nine_character_ids and not _NINE.fullmatch(name):
            yield f"message {i} calls {call['function']['name']} with the id {brief(name)}"


def fix_call_id(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Assign missing ids and correct wrong ones.

    Results without an id answer the calls in their order. Ids that do not fit are renamed in the call and in its results.
    """
    for i, message in enumerate(conversation.messages):
        calls = message.get("tool_calls", [])
        results = [result for _, result in _results(conversation.messages, i)]
        if all(call.get("id") for call in calls):
            yield from _join_the_last_pair(calls, results)
        elif len(results) == len(calls):
            yield from _name_in_order(i, calls, results)
        if form.nine_character_ids:
            yield from _rename_to_nine(i, calls, results)


def _join_the_last_pair(calls: list[ToolCall], results: list[Message]) -> Iterator[str]:
    """Give a result the id of a call, if exactly one call has no result and exactly one result no call."""
    # With one of each, they can only belong together; with several, a pairing would be a guess.
    called = {call["id"] for call in calls}
    answered = {result.get("tool_call_id") for result in results}
    missing = [call for call in calls if call["id"] not in answered]
    unclaimed = [result for result in results if result.get("tool_call_id") not in called]
    if len(missing) == len(unclaimed) == 1:
        yield f"the result of {missing[0]['function']['name']} had the id {brief(unclaimed[0].get('tool_call_id'))}"
        unclaimed[0]["tool_call_id"] = missing[0]["id"]


def _name_in_order(i: int, calls: list[ToolCall], results: list[Message]) -> Iterator[str]:
    """Give calls without an id the ids of results that no other call has, or new ids if these have none either."""
    used_ids = {call.get("id") for call in calls}
    unnamed = [call for call in calls if not call.get("id")]
    # A call without an id has None or "" among `used_ids`, which claims no result.
    unclaimed = [result for result in results if result.get("tool_call_id") not in used_ids - {None, ""}]
    if len(unnamed) == len(unclaimed):
        # Chat formats write results in the order of their calls, so the order decides.
        for call, result in zip(unnamed, unclaimed, strict=True):
            call["id"] = result["tool_call_id"] = _new_id(result.get("tool_call_id") or f"{i}.{calls.index(call)}", used_ids)
            yield f"message {i}: the call of {call['function']['name']} got the id {call['id']}"


def _rename_to_nine(i: int, calls: list[ToolCall], results: list[Message]) -> Iterator[str]:
    """Rename ids to nine characters, in calls and results."""
    used_ids = {call.get("id") for call in calls}
    for call in calls:
        old = call.get("id")
        if old and not _NINE.fullmatch(old):
            call["id"] = _new_id(old, used_ids)
            for result in results:
                if result.get("tool_call_id") == old:
                    result["tool_call_id"] = call["id"]
            yield f"message {i}: the id {brief(old)} written as {call['id']}"


def _new_id(name: str, used_ids: set[str | None]) -> str:
    """Derive an id of nine characters from `name`, so that a file is fixed the same way every time."""
    new = _nine_characters(name)
    while new in used_ids:
        # A dot is in no id, so the longer name is hashed.
        name += "."
        new = _nine_characters(name)
    used_ids.add(new)
    return new


def _nine_characters(name: str) -> str:
    """Return `name` if it has the form of an id, otherwise nine characters of its hash."""
    if _NINE.fullmatch(name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:9]


def _results(messages: list[Message], i: int) -> Iterator[tuple[int, Message]]:
    """Yield the tool messages right after message `i`."""
    for k in range(i + 1, len(messages)):
        if messages[k]["role"] != "tool":
            return
        yield k, messages[k]


def unpaired(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find calls without a result, results without a call, and ids that are used twice."""
    messages = conversation.messages
    for i, message in enumerate(messages):
        # Calls in the last message are what the model learns to write; nothing has answered them yet.
        if "tool_calls" not in message or i == len(messages) - 1:
            continue
        ids = [call.get("id") for call in message["tool_calls"]]
        results = list(_results(messages, i))
        answered = collections.Counter(result.get("tool_call_id") for _, result in results)
        for name, count in collections.Counter(ids).items():
            if count > 1:
                yield f"message {i} has {count} calls with the id {brief(name)}"
            if not answered[name]:
                yield f"message {i} has a call with the id {brief(name)}, which no result answers"
        for k, result in results:
            name = result.get("tool_call_id")
            if name not in ids:
                yield f"message {k} is the result of {brief(name)}, which message {i} does not call"
            elif answered[name] > 1:
                yield f"message {k} answers {brief(name)}, which has {answered[name]} results"
