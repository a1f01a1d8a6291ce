"""The token store: made once, whole or not at all, the same whoever makes it, and errors that name the record."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train import config
from moe_train.data import chat
from moe_train.data.sources import open_source
from moe_train.data.store import TokenStore, _Encoder, open_store
from moe_train.data.tokenizer import HuggingFace

TEXT = config.TextRecord(name="text")
CHAT = config.ChatRecord(name="chat")
COMPLETION = config.CompletionRecord(name="completion")
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]


def stored(path: Path, record: config.Record, tokenizer: HuggingFace, cache: Path, num_proc: int = 1) -> TokenStore:
    records = open_source(config.FileSource(name="files", files=(str(path),), record=record))
    return open_store(records, record, tokenizer, tokenizer.chat_template, cache, num_proc)


def ids(store: TokenStore) -> list[list[int]]:
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number, the records in it, for each chunk that is tokenised."""
    sizes: list[int] = []
    original = _Encoder.__call__

    def counted(self: _Encoder, chunk: list) -> list:
        sizes.append(len(chunk))
        return original(self, chunk)

    monkeypatch.setattr(_Encoder, "__call__", counted)
    return sizes


def test_text_begins_with_bos_ends_with_eos_and_bears_loss(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    texts = ["brown fox", "", "naïve </s> café"]
    store = stored(write_lines("a.jsonl", [{"text": text} for text in texts]), TEXT, tokenizer, tmp_path / "cache")
    assert ids(store) == [[1, *tokenizer.encode(text), 2] for text in texts if text]
    assert store.loss_mask is None and store.num_empty == 1 and store.tokens.dtype == np.uint16
    assert store.origins.tolist() == [[0, 1], [0, 3]]
    assert store.lengths.tolist() == [len(record) - 1 for record in ids(store)]


def test_conversations_and_completions_are_rendered(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    rendered = chat.render(MESSAGES, tokenizer.chat_template, tokenizer)
    pair = {"prompt": MESSAGES[0]["content"], "completion": MESSAGES[1]["content"]}
    for record, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETION, pair)):
        store = stored(write_lines("a.jsonl", [fields]), record, tokenizer, tmp_path / "cache")
        assert store.loss_mask is not None
        assert (ids(store), store.loss_mask.tolist()) == ([rendered.tokens], rendered.loss_mask)


def test_what_is_tokenised_once_is_not_tokenised_again(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], encoded: list[int]
) -> None:
    path = write_lines("a.jsonl", [{"text": f"text {i}"} for i in range(300)])
    first = stored(path, TEXT, tokenizer, tmp_path / "cache")
    assert encoded == [256, 44]
    again = stored(path.rename(tmp_path / "b.jsonl"), TEXT.model_copy(update={"too_long": "drop"}), tokenizer, tmp_path / "cache")
    assert encoded == [256, 44] and again.digest == first.digest
    changed = stored(write_lines("a.jsonl", [{"text": "other"}]), TEXT, tokenizer, tmp_path / "cache")
    assert encoded == [256, 44, 1] and changed.digest != first.digest


def test_a_changed_template_is_tokenised_again(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], encoded: list[int]
) -> None:
    path = write_lines("a.jsonl", [{"messages": MESSAGES}])
    records = open_source(config.FileSource(name="files", files=(str(path),), record=CHAT))
    assert tokenizer.chat_template is not None
    stores = [
        open_store(records, CHAT, tokenizer, template, tmp_path / "cache")
        for template in (tokenizer.chat_template, tokenizer.chat_template.replace("[INST]", "[INST] "))
    ]
    assert encoded == [1, 1] and stores[0].digest != stores[1].digest


def test_one_of_several_at_once_does_the_work(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], encoded: list[int]
) -> None:
    path = write_lines("a.jsonl", [{"text": f"text {i}"} for i in range(600)])
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(stored(path, TEXT, tokenizer, tmp_path / "cache").digest)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1 and sum(encoded) == 600


def test_several_processes_make_the_same_store(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    path = write_lines("a.jsonl", [{"messages": MESSAGES}] * 600)
    alone = stored(path, CHAT, tokenizer, tmp_path / "one", num_proc=1)
    together = stored(path, CHAT, tokenizer, tmp_path / "two", num_proc=2)
    assert alone.digest == together.digest
    broken = write_lines("b.jsonl", [{"messages": MESSAGES}] * 300 + [{"messages": []}])
    with pytest.raises(ValueError, match=r"b\.jsonl:301: messages should be a list"):
        stored(broken, CHAT, tokenizer, tmp_path / "two", num_proc=2)


@pytest.mark.parametrize(
    ("record", "fields", "error"),
    [
        (TEXT, {"body": "a"}, r"a\.jsonl:2: no column 'text'; the record has 'body'"),
        (TEXT, {"text": None}, r"a\.jsonl:2: column 'text' should be text, not None"),
        (TEXT, {"text": "a\ud800"}, r"a\.jsonl:2: column 'text' has half a surrogate pair at character 1"),
        (CHAT, {"messages": MESSAGES, "tools": [{"name": "f"}]}, r"a\.jsonl:2: the record has tools"),
        (CHAT, {"messages": MESSAGES[:1]}, r"a\.jsonl:2: no token would bear loss"),
        (CHAT, {"text": "a"}, r"a\.jsonl:2: no column 'messages'"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, r"a\.jsonl:2: .*surrogate"),
        (COMPLETION, {"prompt": "a"}, r"a\.jsonl:2: no column 'completion'"),
        (COMPLETION, {"prompt": "a", "completion": 3}, r"a\.jsonl:2: column 'completion' should be text, not 3"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_and_nothing_is_left(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], record: config.Record, fields: dict, error: str
) -> None:
    good = {"text": "a", "messages": MESSAGES, "prompt": "a", "completion": "b"}
    path = write_lines("a.jsonl", [good, fields])
    with pytest.raises(ValueError, match=error) as caught:
        stored(path, record, tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_text_at_all(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    for records in ([], [{"text": ""}]):
        with pytest.raises(ValueError, match=r"a\.jsonl: no record with any text"):
            stored(write_lines("a.jsonl", records), TEXT, tokenizer, tmp_path / "cache")


def test_what_a_killed_process_left_is_cleared_and_damage_is_seen(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    path = write_lines("a.jsonl", [{"text": "some text"}])
    stored(path, TEXT, tokenizer, tmp_path / "cache")
    [directory] = (tmp_path / "cache").glob("tokens-*[!.lock]")
    unfinished = directory.rename(directory.with_name(f".{directory.name}.unfinished-x"))
    stored(path, TEXT, tokenizer, tmp_path / "cache")
    assert not unfinished.exists()
    (directory / "tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged .*remove"):
        stored(path, TEXT, tokenizer, tmp_path / "cache")
