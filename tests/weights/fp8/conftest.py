"""Unquantized folders of tiny models, from which the tests make FP8 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.commands import write_and_prove as write
from tests.random_parameters import random_parameters
from tests.tiny import MIXTRAL, ONE


@pytest.fixture(scope="session")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of the same Mixtral for each layout."""
    folders: dict[str, Path] = {}
    layouts: Any = ("hf", "mistral")
    with jax.set_mesh(ONE):
        weights = random_parameters(MIXTRAL, "bfloat16")
        for layout in layouts:
            folders[layout] = tmp_path_factory.mktemp("unquantized") / layout
            options = write.WriteOptions(layout=layout, dtype="bfloat16", depth="tensors")
            write.export_model(weights, MIXTRAL, folders[layout], options)
    return folders
