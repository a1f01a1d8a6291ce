"""Models and tokenizers as objects, for programs that use this package as a library."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from moe_train.checkpoint.load_model import load_model, load_tokenizer
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.model.parameters import parameters
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.gguf.models import MISTRAL, write


def test_a_file_becomes_a_model_that_can_be_called(tmp_path: Path, text: Path) -> None:
    with jax.set_mesh(ONE):
        weights = random_parameters(MISTRAL)
        write(tmp_path, MISTRAL, weights, tokenizer=HuggingFace(text / "tokenizer"))
    with jax.set_mesh(None):
        model = load_model(tmp_path)
        loaded = parameters(model)[1]
        hidden_BTD, routers = jax.jit(lambda model, tokens_BT: model(tokens_BT))(model, np.array([[1, 2, 3]], np.int32))
    assert {path: np.asarray(x).tolist() for path, x in loaded.items()} == {p: np.asarray(x).tolist() for p, x in weights.items()}
    assert hidden_BTD.shape == (1, 3, MISTRAL.model_dim) and routers is None
    assert load_tokenizer(tmp_path).encode("able") == HuggingFace(text / "tokenizer").encode("able")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with jax.set_mesh(ONE), pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        load_model(tmp_path)
