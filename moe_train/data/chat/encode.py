"""Records to training examples. What is trained on and what `data show` shows both come through here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.example import Example
from moe_train.data.records.conversation import Conversation, normalise
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.tokenizer import Tokenizer

_CHARACTERS, _RECORDS = 1 << 17, 1024  # tokenized at once: with more the library takes longer, for want of cache

Where = Callable[[Origin], str]


def encode(
    numbered: Iterable[tuple[Origin, dict[str, Any]]],
    where: Where,
    record: config.Record,
    tokenizer: Tokenizer,
    template: str | None,
) -> Iterator[tuple[Origin, list[Example]]]:
    """Yield the training examples of each record: one for a text, none for an empty one, and for a conversation with tools
    as many as it has assistant turns.

    Args:
        numbered: each record with its origin.
        where: what to call an origin in a message.

    Raises:
        ValueError: a record cannot be used; the message begins with its origin.
    """
    if not isinstance(record, config.TextRecord):
        for conversations in _chunks(numbered, where, record, _size):
            found = conversation_to_tokens.examples_batch([conversation for _, conversation in conversations], template, tokenizer)
            for (origin, _), examples in zip(conversations, found, strict=True):
                if isinstance(examples, ValueError):
                    raise ValueError(f"{where(origin)}: {examples}") from examples
                yield origin, examples
        return
    begin, end = [] if tokenizer.bos_id is None else [tokenizer.bos_id], [tokenizer.eos_id]
    for texts in _chunks(numbered, where, record, len):
        for (origin, _), ids in zip(texts, tokenizer.encode_batch([text for _, text in texts]), strict=True):
            yield origin, [Example([*begin, *ids, *end], None)] if ids else []


def _size(conversation: Conversation) -> int:
    """About its characters, of records of any form; with tools it is several examples."""
    messages, tools = conversation
    said, with_tools = 0, bool(tools)
    for message in messages:
        if isinstance(text := message.get("content"), str):
            said += len(text)
        with_tools = with_tools or "tool_calls" in message
    return said * len(messages) if with_tools else said


def _chunks(
    numbered: Iterable[tuple[Origin, dict[str, Any]]], where: Where, record: config.Record, size: Callable[[Any], int]
) -> Iterator[list[tuple[Origin, Any]]]:
    """The records in their normal form, as many at once as keep the tokenizer's threads busy, in bounded memory."""
    chunk, room = [], _CHARACTERS
    for origin, fields in numbered:
        try:
            normal = normalise(fields, record)
        except ValueError as error:
            raise ValueError(f"{where(origin)}: {error}") from error
        chunk.append((origin, normal))
        room -= size(normal)
        if room <= 0 or len(chunk) == _RECORDS:
            yield chunk
            chunk, room = [], _CHARACTERS
    if chunk:
        yield chunk
