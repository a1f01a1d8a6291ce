"""Training examples: token ids, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem


class Example(NamedTuple):
    """One training example: token ids, and for each id whether the loss covers its prediction (None: all of them)."""

    tokens: list[int]
    loss_mask: list[bool] | None


def has_trained_token(loss_mask: Sequence[bool] | np.ndarray | None, seq_len: int) -> bool:
    """Return whether the part of an example in one row, its first `seq_len` positions, contains a token that is trained on."""
    return loss_mask is None or any(loss_mask[1 : seq_len + 1])


class Turn(NamedTuple):
    """Consecutive messages of the assistant: `messages[start:end]`."""

    start: int
    end: int
    trained_on: bool
    """Whether the turn is trained on."""


def is_trained_on(message: Message) -> bool:
    """Return whether a message is trained on: an assistant message of weight 1, the default."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def turns(messages: list[Message]) -> list[Turn]:
    """Return the assistant's turns. Raises Problem if the messages of a turn differ in weight."""
    result: list[Turn] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        weighs = is_trained_on(message)
        if not result or result[-1].end < i:
            result.append(Turn(i, i + 1, weighs))
        elif result[-1].trained_on != weighs:
            error_text = f"messages {i - 1} and {i} are one turn of the assistant, and differ in weight"
            raise Problem("weight", error_text, "give them the same weight, or put the user's words between them")
        else:
            result[-1] = Turn(result[-1].start, i + 1, weighs)
    return result


def uses_tools(conversation: Conversation) -> bool:
    """Return whether a conversation has tools, calls or results.

    Such a conversation is trained on as its prefixes, each for its last turn.
    """
    return bool(conversation.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in conversation.messages)


def without_tools(why: str) -> Problem:
    """Return the problem for a record with tools that the tokenizer or template cannot represent."""
    versions = "versions v2, v3, v7, v11, v13 and v15 have them"
    remedy = "extend the base with moe-train extend-vocab BASE OUT --tokenizer v3, or drop the record"
    return Problem("tools", f"the record has tools, and {why}; {versions}", remedy)
