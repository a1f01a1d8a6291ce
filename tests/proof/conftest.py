"""Weights with adapters, texts, and exports of them, made once for all files of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.weights.texts import Texts
from tests.proof.exported import LORA, MODEL, make
from tests.random_parameters import random_parameters
from tests.tiny import ONE


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    tokenizer = train_tokenizer(["one two three four"] * 5, 270, tmp_path_factory.mktemp("tokenizer") / "t")
    return Texts(tokenizer, tokenizer.chat_template, "name: run\n")


@pytest.fixture(scope="session")
def weights() -> dict[str, jax.Array]:
    with jax.set_mesh(ONE):
        return random_parameters(MODEL, lora=LORA, scale=0.2)


@pytest.fixture(scope="session")
def exports(
    weights: dict[str, jax.Array], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """(a merged export, one of the base alone) of a layout and dtype."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def find(layout: str, dtype: str) -> tuple[Path, Path]:
        if (layout, dtype) not in made:
            paths = folder / f"{layout}-{dtype}", folder / f"{layout}-{dtype}-base"
            make(paths[0], weights, texts, layout, dtype)
            plain = {path: x for path, x in weights.items() if ".lora_" not in path}
            make(paths[1], plain, texts, layout, dtype, depth="tensors")
            made[layout, dtype] = paths
        return made[layout, dtype]

    return find
