"""The YAML file of the small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.tiny import YAML


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path
