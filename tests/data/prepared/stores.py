"""Prepared sets of files of records, made as training makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.prepared import tokenize_ahead
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.tokenizer import Tokenizer

TEXT = config.TextRecord(name="text")
CHAT = config.ChatRecord(name="chat")
COMPLETION = config.CompletionRecord(name="completion")
ANSWER = config.CompletionRecord(name="completion", too_long="truncate")
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]


def stored(*paths: Path, record: config.Record = TEXT, tokenizer: Tokenizer, cache: Path, **more: Any) -> TokenStore:
    """The prepared set of one source, made where it is not there."""
    said = {key: more.pop(key) for key in ("licence", "origin") if key in more}
    source = config.FileSource(name="files", files=tuple(map(str, paths)), record=record, **said)
    records = open_source(source)
    more.setdefault("template", tokenizer.chat_template)
    template = more.pop("template")
    return TokenStore(tokenize_ahead.prepare(Recipe(source, records, tokenizer, template), cache, **more), records)


def ids(store: TokenStore) -> list[list[int]]:
    lengths = store.lengths()
    return [tokens.tolist() for tokens, *_ in store.read([ExampleSlice(i, 0, int(n)) for i, n in enumerate(lengths)])]


def prepared(data: config.Data, path: str, **more: Any) -> config.Data:
    """The same data from a prepared set."""
    return data.model_copy(update={"train": (config.PreparedSource(name="prepared", path=path, **more),)})
