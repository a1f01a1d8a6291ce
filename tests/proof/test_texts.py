"""What an export holds besides weights."""

from __future__ import annotations

from typing import Any

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.proof import texts as proof_texts


def test_tokenizers_are_read_from_the_directory(exports: Any) -> None:
    export, _ = exports("hf", "float32")
    tokenizer, template = proof_texts.reopened(export, "hf")
    assert isinstance(tokenizer, HuggingFace) and tokenizer.path == export and template
