"""Opening a model from a directory."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from moe_train.checkpoint import model_dir
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.gguf.models import MISTRAL, write


def test_a_folder_with_one_file_is_a_model(tmp_path: Path, text: Path) -> None:
    tokenizer = HuggingFace(text / "tokenizer")
    with jax.set_mesh(ONE):
        file = write(tmp_path, MISTRAL, random_parameters(MISTRAL), tokenizer=tokenizer)
    opened = model_dir.open_model(tmp_path)
    assert opened.model == MISTRAL and opened.chat_template == tokenizer.chat_template
    assert opened.tokenizer.encode("What, ünder?") == tokenizer.encode("What, ünder?")
    assert model_dir.find_tokenizer(file) == model_dir.find_tokenizer(tmp_path)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"one \.gguf file"):
        model_dir.open_model(tmp_path)
