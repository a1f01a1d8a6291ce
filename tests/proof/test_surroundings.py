"""What a proof records of its surroundings."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import numpy as np

from moe_train.proof import surroundings


def test_every_file_but_the_record_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", surroundings.RECORD_FILE):
        (tmp_path / name).write_text(name)
    assert surroundings.file_hashes(tmp_path) == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "sub/b")}


def test_hardware_and_versions_are_those_of_this_process() -> None:
    assert surroundings.hardware()["devices"] == {"cpu": 8} and surroundings.hardware()["processes"] == 1
    found = surroundings.versions()
    assert (found["jax"], found["numpy"]) == (jax.__version__, np.__version__)
