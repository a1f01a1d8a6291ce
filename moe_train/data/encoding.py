"""Records to training examples. What is trained on and what `data show` shows both come through here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_train import config
from moe_train.data import chat
from moe_train.data.conversation import Conversation, normalise
from moe_train.data.example import Example
from moe_train.data.fields import located
from moe_train.data.sources import Origin, Records
from moe_train.data.tokenizer import Tokenizer

_CHARACTERS, _RECORDS = 1 << 20, 1024  # tokenised at once


def encode(
    numbered: Iterable[tuple[Origin, dict[str, Any]]],
    records: Records,
    record: config.Record,
    tokenizer: Tokenizer,
    template: str | None,
) -> Iterator[tuple[Origin, list[Example]]]:
    """What each of the records is trained as: a text is one example, an empty one none, and a conversation with tools as
    many as it has assistant turns. records: where `numbered` came from.

    Raises ValueError with file and line for a record that cannot be used.
    """
    normal = ((origin, located(records.where(origin), normalise, fields, record)) for origin, fields in numbered)
    if not isinstance(record, config.TextRecord):
        for conversations in _chunks(normal, _size):
            found = chat.examples_batch([conversation for _, conversation in conversations], template, tokenizer)
            for (origin, _), examples in zip(conversations, found, strict=True):
                if isinstance(examples, ValueError):
                    raise ValueError(f"{records.where(origin)}: {examples}") from examples
                yield origin, examples
        return
    begin, end = [] if tokenizer.bos_id is None else [tokenizer.bos_id], [tokenizer.eos_id]
    for chunk in _chunks(normal, len):
        for (origin, _), ids in zip(chunk, tokenizer.encode_batch([text for _, text in chunk]), strict=True):
            yield origin, [Example([*begin, *ids, *end], None)] if ids else []


def _size(conversation: Conversation) -> int:
    """About its characters, of records of any form; with tools it is several examples."""
    messages, tools = conversation
    said = sum(len(text) for message in messages if isinstance(text := message.get("content"), str))
    return said * len(messages) if tools or any("tool_calls" in message for message in messages) else said


def _chunks(records: Iterator[tuple[Origin, Any]], size: Callable[[Any], int]) -> Iterator[list[tuple[Origin, Any]]]:
    """As many at once as keep the tokenizer's threads busy, in bounded memory."""
    for first in records:
        chunk, room = [first], _CHARACTERS - size(first[1])
        for item in itertools.islice(records, _RECORDS - 1) if room > 0 else ():
            chunk.append(item)
            room -= size(item[1])
            if room <= 0:
                break
        yield chunk
