"""The texts of a source, as for training a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.records.open_source import texts

ROWS = [{"text": "one"}, {"text": "zwei, ü"}, {"text": "三"}]
TEXT = config.TextRecord(name="text")


def test_the_texts_of_a_source(write_lines: Callable[..., Path]) -> None:
    section = config.FileSource(name="files", files=(str(write_lines("a.jsonl", [*ROWS, {"text": 1}])),), record=TEXT)
    found = texts(section)
    assert [next(found) for _ in ROWS] == [row["text"] for row in ROWS]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: column 'text' should be text, not 1"):
        next(found)
    with pytest.raises(ValueError, match="not chat records"):
        next(texts(section.model_copy(update={"record": config.ChatRecord(name="chat")})))
