"""The code's revision names the commit, changes to it, and the content of the package whatever its place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_train.machine import revision


def git(folder: Path, *arguments: str) -> str:
    setting = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", str(folder), *setting, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_checkout_names_its_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(revision, "PACKAGE", package)
    read = revision.code_revision.__wrapped__
    assert read().commit is None and read().is_dirty is None and "without a git checkout" in read().in_words()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    assert read().commit == git(tmp_path, "rev-parse", "HEAD").strip() and read().is_dirty is False
    before = read().package_sha256
    (package / "b.py").write_text("")  # a new file counts as a change, too
    assert read().is_dirty is True and read().package_sha256 != before
    assert "with changes that are not committed" in read().in_words()


def test_the_hash_depends_on_names_and_contents_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.py").write_text("x = 1\n")
    (tmp_path / "two" / "a.pyc").write_bytes(b"compiled")
    assert revision.hash_of_package(tmp_path / "one") == revision.hash_of_package(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a.py").rename(tmp_path / "two" / "a.py")
    assert revision.hash_of_package(tmp_path / "one") != revision.hash_of_package(tmp_path / "two")
