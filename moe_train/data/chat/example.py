"""Training examples: token ids, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_train.data.records.normal_form import Conversation, Message, reasoning_of
from moe_train.data.records.problem import Problem


class Example(NamedTuple):
    """One training example: token ids, and for each id whether the loss covers its prediction (None: all of them)."""

    tokens: list[int]
    loss_mask: list[bool] | None
    merged: MergedTurns | None = None
    """How turns of a conversation with tools were merged into this example; None for any other example."""
    answers: list[int] | None = None
    """For each id, the number of the answer that its segment belongs to (1, 2, …), plus `SEGMENT_START` on the first id of a
    segment; None for an example of one segment. Such an example is packed as a whole, never split or cut.
    """
    values: tuple[float, ...] = ()
    """Numbers that belong to the whole example; the record kind decides what they are (see `pairs_to_tokens`)."""
    media: tuple[bytes, ...] = ()
    """Content of the pictures, or of the clips of sound, that tokens stand for, in the order of the tokens."""
    media_files: tuple[str, ...] = ()
    """Files of those pictures or clips that are no data URLs."""

    @property
    def num_positions(self) -> int:
        """Number of positions in a row: the last id of a segment is only predicted, and takes none."""
        segments = 1 if self.answers is None else sum(answer >= SEGMENT_START for answer in self.answers)
        return len(self.tokens) - segments


class RenderedPrompt(NamedTuple):
    """A conversation up to where the assistant's next turn begins."""

    tokens: list[int]
    media: tuple[bytes, ...] = ()
    """Content of the pictures, or of the clips of sound, that tokens stand for, in the order of the tokens."""


SEGMENT_START = 128
"""Added to the number of an answer in `Example.answers` where a segment begins."""


class MergedTurns(NamedTuple):
    """Turns of a conversation with tools that share an example, because the tokens before each are a prefix of the example."""

    ends: tuple[int, ...]
    """For each trained turn, the number of tokens up to its end; an example that is too long may be cut there."""
    separate_tokens: int
    """Number of tokens of the same turns with an example for each, which repeats the tokens before it."""
    restart: str | None = None
    """Why the turns could not be appended to the example before, such as `NEW_USER_TURN`; None for a conversation's first one."""
    may_be_cut: bool = True
    """Whether an example that is too long may be cut at `ends`; not with pictures, whose features would lack tokens."""


NEW_USER_TURN = "a new user turn changes what stands before it"
REWRITTEN = "the chat format writes earlier messages differently later"
WITHOUT_ID = "a first call is generated without the id that later turns see"


def restart_reason(between: list[Message]) -> str:
    """Return why a turn begins a new example, given the messages between it and the trained turn before it."""
    if any(message["role"] == "user" for message in between):
        return NEW_USER_TURN
    return REWRITTEN


def fitting_tokens(merged: MergedTurns | None, limit: int) -> int:
    """Return how many tokens to keep so that at most `limit` remain and no turn is cut; 0 if no trained turn fits."""
    ends = merged.ends if merged is not None and merged.may_be_cut else ()
    # A cut at the end of a turn keeps its end token, so the model still learns to stop.
    return max((end for end in ends if end <= limit), default=0)


def has_trained_token(loss_mask: Sequence[bool] | np.ndarray | None, seq_len: int) -> bool:
    """Return whether the part of an example in one row, its first `seq_len` positions, contains a token that is trained on."""
    # The first id is never predicted, and a row of n positions predicts the n ids after it.
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
        # A turn that ends right before this message goes on with it.
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

    What stands before a turn of such a conversation may depend on the turn, so that turns share an example only if their tokens
    allow it.
    """
    return bool(conversation.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in conversation.messages)


OTHER_TEMPLATE = "with --chat-template (in a config: data.chat_template)"
"""The option for another chat template, for remedies."""
EXTEND_VOCAB = "extend the base with moe-train extend-vocab BASE OUT --tokenizer v3"
"""The remedy for a base with the vocabulary of Mistral's v1, which has no tokens for tools."""


def by_turn(conversation: Conversation) -> bool:
    """Return whether what a chat template writes before a turn, or of earlier turns, may depend on the turn.

    This is the case with tools, and with reasoning, which many templates write for the last turn alone.
    """
    return uses_tools(conversation) or any(_reasons(message) for message in conversation.messages)


REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which chat templates read reasoning; the normal form has parts instead."""


def _reasons(message: Message) -> bool:
    """Return whether a message has reasoning, in the normal form or in a field for a chat template."""
    if len(message) == 2 and message.get("content").__class__ is str:
        return False  # the fast path for almost all messages
    return bool(reasoning_of(message)) or any(name in message for name in REASONING_FIELDS)


def without_tools(why: str, remedy: str) -> Problem:
    """Return the problem for a record with tools that the tokenizer or template cannot represent."""
    return Problem("tools", f"the record has tools, and {why}", remedy)
