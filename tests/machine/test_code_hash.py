"""The hash over the package's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_train.machine import code_hash


def test_a_copy_has_the_same_hash_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "moe_train"
    for folder in ("machine", "run"):
        shutil.copytree(Path(code_hash.__file__).parents[1] / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    hashes = []
    monkeypatch.setattr(code_hash, "__file__", str(copy / "machine" / "code_hash.py"))
    for change in ("", "", "# a comment\n"):
        with (copy / "run" / "loop.py").open("a") as file:
            file.write(change)
        hashes.append(code_hash.code_sha256.__wrapped__())
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 64
