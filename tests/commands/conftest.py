"""What several commands start from."""

from __future__ import annotations

import pytest

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.tokenizers.huggingface import HuggingFace


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """A tokenizer of fewer than 300 ids."""
    return train_tokenizer(["some text to learn from"] * 5, 270, tmp_path_factory.mktemp("tokenizer") / "t")
