"""Records to examples: in order, with their origins, and errors that begin with the place of the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from moe_train import config
from moe_train.data.chat import encode as encoding
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
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


def test_keys_that_are_not_read_are_counted(tokenizer: HuggingFace) -> None:
    unread: Counter[str] = Counter()
    records = [{"messages": SINGLE, "id": 1}, {"messages": SINGLE}, {"messages": [SINGLE[0] | {"turn": 1}, SINGLE[1]], "id": 2}]
    assert len(list(encode(numbered(*records), where, CHAT, tokenizer, tokenizer.chat_template, unread))) == 3
    assert unread == {"id": 2, "messages.turn": 1}


def test_pairs_and_labelled_answers_are_examples_of_several_segments(tokenizer: HuggingFace) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for record, fields, count in (
        (config.PreferenceRecord(name="preference"), pair, 2),
        (config.LabelledRecord(name="labelled"), {"prompt": "a", "completion": "b", "label": True}, 1),
    ):
        [(_, [example])] = encode(numbered(fields), where, record, tokenizer, tokenizer.chat_template)
        assert len(example.tokens) - example.num_positions == count
        with pytest.raises(ValueError, match=r"^a\.jsonl:1: .*empty"):
            empty = fields | {name: "" for name in ("chosen", "completion") if name in fields}
            list(encode(numbered(empty), where, record, tokenizer, tokenizer.chat_template))


def test_a_pair_is_no_completion(tokenizer: HuggingFace) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=r"^a\.jsonl:1: the record has the key 'rejected'.*--ignore rejected"):
        completion = config.CompletionRecord(name="completion", completion="chosen")
        list(encode(numbered(pair), where, completion, tokenizer, tokenizer.chat_template))


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


def test_a_text_that_the_tokenizer_refuses_is_named(mistral: Mistral) -> None:
    too_long = " " * 1_100_000 + "a"
    with pytest.raises(ValueError, match=r"^a\.jsonl:2: the text has 1,100,001 characters; .*; shorten or drop it"):
        list(encode(numbered({"text": "a"}, {"text": too_long}), where, TEXT, mistral, None))
