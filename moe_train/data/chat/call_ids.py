"""Find the ids of calls in a rendering: they are random, and never trained on.

A conversation is rendered a second time with every character of its ids replaced; what changes is an id.
"""

from __future__ import annotations

import string

from moe_train.data.chat.example import OTHER_TEMPLATE
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.tokenizer import Span
from moe_train.machine.files import JsonObject

# Each digit or letter is replaced by the next of its kind, so an id keeps its length and its form.
_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
_OTHER = str.maketrans("".join(_KINDS), "".join(kind[1:] + kind[0] for kind in _KINDS))


def has_call_ids(message: Message) -> bool:
    """Return whether a message has a call with an id."""
    return any("id" in call for call in message.get("tool_calls", ()))


def with_other_ids(message: Message) -> Message:
    """Return the message with every character of the ids of calls replaced by another, in calls and in results."""
    if "tool_calls" in message:
        return message | {"tool_calls": [_with_other_id(call) for call in message["tool_calls"]]}
    if "tool_call_id" in message:
        return message | {"tool_call_id": message["tool_call_id"].translate(_OTHER)}
    return message


def _with_other_id(call: JsonObject) -> JsonObject:
    """Return the call with every character of its id, if it has one, replaced by another."""
    if "id" not in call:
        return call
    return call | {"id": call["id"].translate(_OTHER)}


def differing(text: str, id_variant: str) -> list[Span]:
    """Find the ids of calls in a text: the characters that change when every character of the ids is replaced."""
    if len(id_variant) != len(text):
        message = "the chat template writes calls differently for different ids, so that what is random cannot be told"
        raise Problem("template", message, f"name another template {OTHER_TEMPLATE}")
    spans: list[Span] = []
    for i, (a, b) in enumerate(zip(text, id_variant, strict=True)):
        if a != b:
            # Extend the span that ends here, or begin one.
            spans.append((spans.pop()[0] if spans and spans[-1][1] == i else i, i + 1))
    return spans
