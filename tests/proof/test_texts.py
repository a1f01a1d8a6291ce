"""What an export holds besides weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.proof import texts as proof_texts
from moe_train.proof.checks import Fault, NotChecked


def test_tokenizers_are_read_from_the_directory(exports: Any) -> None:
    export, _ = exports("hf", "float32")
    tokenizer, template = proof_texts.load_texts(export, "hf")
    assert isinstance(tokenizer, HuggingFace) and tokenizer.path == export and template


def test_other_tokens_than_in_training_are_a_fault() -> None:
    proof_texts.check_tokens("a conversation", [[1, 2]], [[1, 2]])
    with pytest.raises(Fault, match="the template in the directory renders a conversation to other tokens than in training"):
        proof_texts.check_tokens("a conversation", [[1, 2]], [[1, 3]])


def test_the_end_of_a_generation_is_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert proof_texts.check_generation(tmp_path, "hf", [2]).summary.endswith("end-of-sequence token, 2")
    with pytest.raises(Fault, match=r"generation_config\.json states the end-of-sequence token 2, but the tokenizer's is 3"):
        proof_texts.check_generation(tmp_path, "hf", [3])
    with pytest.raises(NotChecked, match="leaves the end-of-sequence token to the tokenizer's own files"):
        proof_texts.check_generation(tmp_path, "mistral", [2])


def test_an_export_without_a_tokenizer_is_not_checked(tmp_path: Path) -> None:
    with pytest.raises(NotChecked, match="the export has no tokenizer"):
        proof_texts.load_texts(tmp_path, "hf")
