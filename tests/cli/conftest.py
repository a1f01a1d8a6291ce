"""A config, and stand-ins for the work of commands, so that a test sees what was handed on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RUN = """\
name: tiny
run_dir: runs/tiny
init_from: models/tiny
train: {steps: 10, batch_size: 8, seq_len: 32}
optimizer: {name: adamw, learning_rate: 1e-4}
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a module by the functions that a command calls."""

    def put(module: str, **functions: Any) -> None:
        fake = ModuleType(module)
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, module, fake)
        package, _, name = module.rpartition(".")
        monkeypatch.setattr(sys.modules[package] if package in sys.modules else __import__(package), name, fake, raising=False)

    return put


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    """The YAML file of a run."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)
