"""A file is hashed once, and again when it changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moe_train.data.records.scan import scan_file


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = tmp_path / "a.jsonl", tmp_path / "scans"
    file.write_text('{"text": "a"}\n')
    first = scan_file(file, True, memory)
    assert not memory.exists(), "it was written just now: it could change within the same tick of the clock"
    os.utime(file, ns=(10**18, 10**18))
    assert scan_file(file, True, memory) == first and len(list(memory.iterdir())) == 1
    monkeypatch.setattr(hashlib, "sha256", forgetful := _Counting())
    assert scan_file(file, True, memory) == first and forgetful.files == 0
    file.write_text('{"text": "b"}\n')
    os.utime(file, ns=(10**18, 10**18))  # the size and the modification time are those of before
    assert scan_file(file, True, memory) != first and forgetful.files == 1


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    file, memory = tmp_path / "a.jsonl", tmp_path / "scans"
    file.write_text('{"text": "a"}\n')
    os.utime(file, ns=(10**18, 10**18))
    first = scan_file(file, True, memory)
    [remembered] = memory.iterdir()
    content = remembered.read_bytes()
    for damaged in (b"", content[:-2], content.replace(b", 14,", b", 15,")):
        assert damaged != content
        remembered.write_bytes(damaged)
        assert scan_file(file, True, memory) == first and remembered.read_bytes() == content


class _Counting:
    """hashlib.sha256, counting how often it starts empty, as for the content of a file."""

    files = 0
    original = staticmethod(hashlib.sha256)

    def __call__(self, data: bytes | None = None):
        self.files += data is None
        return self.original() if data is None else self.original(data)
