"""Contents of data URLs and files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.data.records.data_urls import data_of
from moe_train.data.records.problem import Problem


def test_contents_and_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hi")
    os.mkfifo(tmp_path / "pipe")
    assert data_of(str(tmp_path / "a"), "a", "sound", "sound") == b"hi"
    assert data_of("data:audio/wav;base64,aGk=", "a", "sound", "sound") == b"hi"
    for reference, reason in (
        ("data:audio/wav,hi", "is no data URL of sound"),
        ("data:audio/wav;base64,clips/1.wav", "is not base64"),
        (str(tmp_path / "b"), "there is no sound"),
        (str(tmp_path), "cannot be read: Is a directory"),
        (str(tmp_path / "pipe"), "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
    ):
        with pytest.raises(Problem, match=reason):
            data_of(reference, "a", "sound", "sound")
