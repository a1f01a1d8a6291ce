"""A directory is there whole or not at all, and what was there stays."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moe_train.machine.files import new_directory, refuse_existing, write_text


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "new"
    with new_directory(path) as directory:
        (directory / "part").mkdir()
        (directory / "part" / "file").write_text("a")
        assert not path.exists()
    assert (path / "part" / "file").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "new") as directory:
        (directory / "file").write_text("a")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match=r"No space left on device; .*new was not written"), new_directory(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_refused_before_the_work_and_after_it(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.mkdir()
    with new_directory(path) as directory:  # an empty directory is in nobody's way
        (directory / "file").write_text("first")
    began = False
    with pytest.raises(FileExistsError, match="there already exists"), new_directory(path):
        began = True
    assert not began
    with pytest.raises(FileExistsError), new_directory(tmp_path / "raced") as directory:
        (directory / "file").write_text("second")
        (tmp_path / "raced").mkdir()
        (tmp_path / "raced" / "file").write_text("first")
    assert [(p / "file").read_text() for p in sorted(tmp_path.iterdir())] == ["first", "first"]


def test_a_file_is_refused_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "out.yaml").write_text("a: 1\n")
    with pytest.raises(FileExistsError, match=r"out.yaml already exists; remove it, or choose another name"):
        refuse_existing(tmp_path / "out.yaml")


def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'"):
        write_text(tmp_path / "page.html", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_brings_its_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "page.html", "x")
    assert (tmp_path / "new" / "page.html").read_text() == "x"


def test_a_url_becomes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs:/bucket/out is a URL, but a directory is needed"), new_directory("gs://bucket/out"):
        pass
    assert not list(tmp_path.iterdir())
