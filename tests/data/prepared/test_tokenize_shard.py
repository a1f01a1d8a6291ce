"""A shard: the ids and loss mask of each record, or an error that names the first that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.prepared.shards import Shard
from moe_train.data.prepared.store import ExampleSlice
from moe_train.data.prepared.tokenize_shard import Recipe, write_shard
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.open_source import open_source
from moe_train.data.records.source import Span
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import CHAT, COMPLETION, MESSAGES, TEXT, ids, stored


def test_text_begins_with_bos_ends_with_eos_and_bears_loss(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    texts = ["brown fox", "", "naïve </s> café"]
    path = write_lines("a.jsonl", [{"text": text} for text in texts])
    store = stored(path, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert ids(store) == [[1, *tokenizer.encode(text), 2] for text in texts if text]
    assert store.read([ExampleSlice(0, 0, 2)])[0][1] is None and store.manifest.dtype == "uint16"
    assert [store.where(i) for i in range(2)] == [f"{path}:1", f"{path}:3"]
    made = store.manifest
    assert (made.records, made.empty, made.examples) == (3, 1, 2) and made.tokens == made.loss_tokens == sum(map(len, ids(store)))
    assert store.lengths().tolist() == [len(example) - 1 for example in ids(store)]


def test_conversations_and_completions_are_rendered(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    (rendered,) = conversation_to_tokens.examples(Conversation(MESSAGES, []), tokenizer.chat_template, tokenizer)
    pair = {"prompt": MESSAGES[0]["content"], "completion": MESSAGES[1]["content"]}
    for record, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETION, pair)):
        path = write_lines("a.jsonl", [fields])
        store = stored(path, record=record, tokenizer=tokenizer, cache=tmp_path / "cache")
        [(tokens, mask, *_)] = store.read([ExampleSlice(0, 0, len(rendered.tokens) - 1)])
        assert mask is not None and (tokens.tolist(), mask.tolist()) == rendered[:2]
        assert store.manifest.loss_tokens == sum(mask)


@pytest.mark.parametrize(
    ("record", "fields", "error"),
    [
        (TEXT, {"body": "a"}, r"a\.jsonl:2: no column 'text'; the record has 'body'"),
        (TEXT, {"text": None}, r"a\.jsonl:2: column 'text' is null or empty; write its text"),
        (TEXT, {"text": "a\ud800"}, r"a\.jsonl:2: column 'text' has half a surrogate pair at character 1"),
        (CHAT, {"messages": MESSAGES, "tools": [{"name": "f"}]}, r"a\.jsonl:2: .*tool"),
        (CHAT, {"messages": MESSAGES[:1]}, r"a\.jsonl:2: the last message is user, so nothing answers it"),
        (CHAT, {"text": "a"}, r"a\.jsonl:2: the record is of the kind text .* and its source is read as chat"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, r"a\.jsonl:2: .*surrogate"),
        (COMPLETION, {"prompt": "a"}, r"a\.jsonl:2: no column 'completion'"),
        (COMPLETION, {"prompt": "a", "completion": 3}, r"a\.jsonl:2: column 'completion' should be text or messages, not 3"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_and_nothing_is_left(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], record: config.Record, fields: dict, error: str
) -> None:
    good = {"text": "a", "messages": MESSAGES, "prompt": "a", "completion": "b"}
    path = write_lines("a.jsonl", [good, fields])
    with pytest.raises(ValueError, match=error) as caught:
        stored(path, record=record, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_shard_says_what_it_holds(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    path = write_lines("a.jsonl", [{"text": "fox"}, {"text": ""}, {"text": "dog"}])
    source = config.FileSource(name="files", files=(str(path),), record=TEXT)
    records = open_source(source)
    progress: list[tuple[int, int]] = []
    shard = Shard("key", (Span(0),))
    write_shard(tmp_path / "key", shard, Recipe(source, records, tokenizer, None), lambda *more: progress.append(more))
    facts = json.loads((tmp_path / "key" / "facts.json").read_text())
    tokens = np.fromfile(tmp_path / "key" / "tokens", facts["dtype"])
    assert tokens.tolist() == [1, *tokenizer.encode("fox"), 2, 1, *tokenizer.encode("dog"), 2]
    assert (facts["dtype"], facts["examples"], facts["empty"], facts["per_span"]) == ("uint16", 2, 1, [[3, len(tokens)]])
    assert np.fromfile(tmp_path / "key" / "origins", "int64").tolist() == [0, 1, 0, 3]
    assert [sum(part) for part in zip(*progress, strict=True)] == [3, len(tokens)]
    assert facts["sizes"] == {name: (tmp_path / "key" / name).stat().st_size for name in ("offsets", "origins", "tokens")}
