"""Records to examples: in order, with their origins, and errors that begin with the place of the record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moe_train import config
from moe_train.data.chat import encode as encoding
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import SINGLE, render

TEXT = config.TextRecord(name="text")
CHAT = config.ChatRecord(name="chat")


def numbered(*records: dict[str, Any]) -> Iterator[tuple[Origin, dict[str, Any]]]:
    return ((Origin(0, number), record) for number, record in enumerate(records, start=1))


def where(origin: Origin) -> str:
    return f"a.jsonl:{origin.number}"


def test_a_text_stands_between_bos_and_eos_and_an_empty_one_gives_nothing(tokenizer: HuggingFace) -> None:
    found = list(encode(numbered({"text": "a</s>"}, {"text": ""}), where, TEXT, tokenizer, None))
    assert found == [(Origin(0, 1), [Example([1, *tokenizer.encode("a</s>"), 2], None)]), (Origin(0, 2), [])]


def test_a_conversation_becomes_what_the_template_says(tokenizer: HuggingFace) -> None:
    [(origin, found)] = encode(numbered({"messages": SINGLE}), where, CHAT, tokenizer, tokenizer.chat_template)
    assert origin == Origin(0, 1) and found == [render(SINGLE, tokenizer.chat_template, tokenizer)]


@pytest.mark.parametrize(("characters", "records"), [(1, 1024), (1 << 17, 2)])
def test_the_size_of_a_chunk_changes_nothing(
    tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch, characters: int, records: int
) -> None:
    texts = [{"text": f"text {n}"} for n in range(5)]
    expected = list(encode(numbered(*texts), where, TEXT, tokenizer, None))
    monkeypatch.setattr(encoding, "_CHARACTERS", characters)
    monkeypatch.setattr(encoding, "_RECORDS", records)
    assert list(encode(numbered(*texts), where, TEXT, tokenizer, None)) == expected


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (TEXT, {"text": 3}, "a.jsonl:2: column 'text' should be text, not 3"),
        (CHAT, {"messages": SINGLE[:1]}, "a.jsonl:2: the last message is user"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(
    tokenizer: HuggingFace, record: config.Record, fields: dict[str, Any], message: str
) -> None:
    good = {"text": "a", "messages": SINGLE}
    with pytest.raises(ValueError, match=message):
        list(encode(numbered(good, fields), where, record, tokenizer, tokenizer.chat_template))
