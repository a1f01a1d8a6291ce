"""The tokenizer of the small text, whose vocabulary fits the tiny models of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.tokenizers.huggingface import HuggingFace


@pytest.fixture(scope="session")
def tokenizer(text: Path) -> HuggingFace:
    return HuggingFace(text / "tokenizer")
