"""A damaged file that only saves work is named and made again, and a folder that cannot be used stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.machine import checked_file
from moe_train.machine.checked_file import read_checked, write_checked


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_checked(tmp_path / "deep" / "a") is None
    write_checked(tmp_path / "deep" / "a", "first\nsecond\n")
    assert read_checked(tmp_path / "deep" / "a") == "first\nsecond\n"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    file = tmp_path / "a"
    write_checked(file, "[1, 2]")
    content = file.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    file.write_bytes({"empty": b"", "cut": content[:-1], "flipped": flipped, "foreign": b"\xff\n[1, 2]"}[damage])
    assert read_checked(file) is None
    assert caplog.messages == [f"{file} is damaged; it is made again"]


def test_a_folder_that_cannot_be_used_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checked_file._warn_once.cache_clear()
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        write_checked(tmp_path / "file" / "a", "1")
        assert read_checked(tmp_path / "folder") is None
    consequence = "so each start computes again what they would remember"
    assert caplog.messages == [
        f"cannot write the files in {tmp_path / 'file'} (File exists), {consequence}",
        f"cannot read the files in {tmp_path} (Is a directory), {consequence}",
    ]
