"""A small tokenizer, trained once for all tests of the data package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.data.tokenizer import HuggingFace
from moe_train.data.train_tokenizer import train_bpe

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "What does json.dumps do? It serialises an object to a JSON formatted string.",
    "Grüße aus München, 東京 and naïve café: 3.14159 = π roughly.",
    "def add(a, b):\n    return a + b\n",
] * 8


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_bpe(TEXTS, 360, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSON lines and return the path."""

    def write(name: str, records: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
