"""Tokenizers that several folders of data share."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import TEKKEN


@pytest.fixture(scope="session")
def mistral() -> Mistral:
    tokenizer = load_tokenizer(config.MistralTokenizer(name="mistral", path=str(TEKKEN)))
    assert isinstance(tokenizer, Mistral)
    return tokenizer
