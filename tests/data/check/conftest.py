"""The tokenizer of Mistral's version 3, which has tool calls."""

from __future__ import annotations

import pytest

from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import V3


@pytest.fixture(scope="module")
def v3() -> Mistral:
    return Mistral(V3)
