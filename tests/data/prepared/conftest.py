"""A bucket in memory, and data to prepare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from moe_train import config
from tests.data.prepared.stores import ANSWER


@pytest.fixture
def bucket() -> Any:
    """fsspec's memory://, emptied."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


@pytest.fixture
def data(write_lines: Callable[..., Path], tmp_path: Path) -> config.Data:
    """Training on a file of 200 completions."""
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over lazy dogs".split()
    answers = [{"prompt": "What?", "completion": " ".join(rng.choice(words, rng.integers(1, 30)))} for _ in range(200)]
    path = write_lines("a.jsonl", answers)
    source = config.FileSource(name="files", files=(str(path),), record=ANSWER)
    return config.Data(train=(source,), cache_dir=str(tmp_path / "cache"))
