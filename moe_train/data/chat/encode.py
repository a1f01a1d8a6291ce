"""Convert records to training examples; training and `data show` both use this file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.classified_to_tokens import classified_example
from moe_train.data.chat.example import Example
from moe_train.data.chat.pairs_to_tokens import pair_examples_batch
from moe_train.data.records.conversation import read
from moe_train.data.records.media import locate_media, shows_media
from moe_train.data.records.normal_form import ClassifiedText, NormalRecord, messages_of, reasoning_of, texts_of
from moe_train.data.records.problem import located
from moe_train.data.records.source import Origin
from moe_train.data.records.unread import count
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject

# Tokenized at once; larger batches no longer fit the CPU cache and are slower.
_CHARACTERS = 1 << 17
_RECORDS = 1024

FormatOrigin = Callable[[Origin], str]
"""A function that formats the location of a record for messages."""
FolderOfOrigin = Callable[[Origin], Path | None]
"""A function that returns the folder of a record's pictures and sound; None if it is in no folder."""


def encode(
    numbered: Iterable[tuple[Origin, JsonObject]],
    format_origin: FormatOrigin,
    record: config.Record,
    tokenizer: Tokenizer,
    template: str | None,
    unread: Counter[str] | None = None,
    folder_of: FolderOfOrigin | None = None,
) -> Iterator[tuple[Origin, list[Example]]]:
    """Yield the training examples of each record with its origin.

    A text gives one example, an empty text none, a conversation with tools as few as its tokens allow, and a preference pair or a
    labelled answer one of several segments.

    Args:
        numbered: Each record with its origin.
        format_origin: Formats an origin for a message.
        record: The section that says how to read the records.
        tokenizer: The tokenizer.
        template: The chat template; None if there is none.
        unread: Receives the number of records in which a key was not read, by its name; None not to count.
        folder_of: Returns the folder in which pictures of a record are; None if all are data URLs.

    Raises:
        ValueError: If a record cannot be used; the message begins with its origin.
    """
    reader = _Reader(record, format_origin, unread, folder_of)
    if isinstance(record, config.ClassificationRecord):
        for classified in _chunks(numbered, reader, _size):
            for origin, normal in classified:
                yield origin, [located(format_origin(origin), classified_example, normal, template, tokenizer)]
        return
    if not isinstance(record, config.TextRecord):
        conversation_to_tokens.check_section(record, template, tokenizer)
        judged = isinstance(record, config.PreferenceRecord | config.LabelledRecord)
        examples_batch = pair_examples_batch if judged else conversation_to_tokens.examples_batch
        for records in _chunks(numbered, reader, _size):
            results = examples_batch([normal for _, normal in records], template, tokenizer)
            for (origin, _), examples in zip(records, results, strict=True):
                if isinstance(examples, ValueError):
                    raise ValueError(f"{format_origin(origin)}: {examples}") from examples
                yield origin, examples
        return
    # A text begins and ends as one document; the model learns to stop at its end.
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [tokenizer.eos_id]
    for texts in _chunks(numbered, reader, len):
        for (origin, _), ids in zip(texts, _encoded(texts, format_origin, tokenizer), strict=True):
            yield origin, [Example([*begin, *ids, *end], None)] if ids else []


def _encoded(texts: Sequence[tuple[Origin, str]], format_origin: FormatOrigin, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of each text. Raises ValueError, with its origin, for the first that the tokenizer refuses."""
    try:
        return tokenizer.encode_batch([text for _, text in texts])
    except ValueError:
        # The error of a batch does not say which of its texts is at fault, so they are encoded one by one.
        return [located(format_origin(origin), tokenizer.encode, text) for origin, text in texts]


def _size(record: NormalRecord) -> int:
    """Estimate the number of characters to tokenize, for records of any form."""
    if isinstance(record, ClassifiedText) and isinstance(record.content, str):
        return len(record.content)
    num_characters = 0
    for message in messages_of(record):
        content = message.get("content")
        # An estimate is enough here: calls and tools are not counted.
        if isinstance(content, list):
            content = "".join((*texts_of(message), *reasoning_of(message)))
        if isinstance(content, str):
            num_characters += len(content)
    return num_characters


class _Reader(NamedTuple):
    """How records become their normal form; see `encode`."""

    section: config.Record
    format_origin: FormatOrigin
    unread: Counter[str] | None
    folder_of: FolderOfOrigin | None

    def read(self, origin: Origin, fields: JsonObject) -> NormalRecord:
        """Convert a record. Raises ValueError, with its origin, if that is not possible."""
        try:
            reading = read(fields, self.section)
            if shows_media(reading.record):
                locate_media(reading.record, None if self.folder_of is None else self.folder_of(origin))
        except ValueError as error:
            raise ValueError(f"{self.format_origin(origin)}: {error}") from error
        if reading.unread and self.unread is not None:
            count(self.unread, reading.unread)
        return reading.record


def _chunks(
    numbered: Iterable[tuple[Origin, JsonObject]], reader: _Reader, size: Callable[[Any], int]
) -> Iterator[list[tuple[Origin, Any]]]:
    """Yield records in the normal form, as many at once as keep the tokenizer's threads busy within bounded memory."""
    chunk = []
    characters_left = _CHARACTERS
    for origin, fields in numbered:
        normal = reader.read(origin, fields)
        chunk.append((origin, normal))
        characters_left -= size(normal)
        if characters_left <= 0 or len(chunk) == _RECORDS:
            yield chunk
            chunk = []
            characters_left = _CHARACTERS
    if chunk:
        yield chunk
