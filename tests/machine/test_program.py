"""Commands in messages run as they stand in the shell that reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.machine import program


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory with a virtual environment in it, whose interpreter runs this process."""
    bin_dir = tmp_path / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    script = bin_dir / "moe-train"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(bin_dir / "python"))
    program.program.cache_clear()
    yield bin_dir
    program.program.cache_clear()


def test_an_environment_that_is_not_active_is_named(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert program.program() == ".venv/bin/moe-train"
    assert program.runnable("retry with moe-train data check F") == "retry with .venv/bin/moe-train data check F"
    assert program.runnable("# .venv/bin/moe-train train x.yaml") == "# .venv/bin/moe-train train x.yaml"
    assert program.runnable("use `moe-train plan`; moe-train is fast") == "use `.venv/bin/moe-train plan`; moe-train is fast"
    assert program.runnable("moe-train: run.yaml:3: no") == "moe-train: run.yaml:3: no"


def test_an_active_environment_needs_no_path(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}/usr/bin")
    assert program.program() == "moe-train"


def test_without_a_script_the_package_is_run(environment: Path) -> None:
    (environment / "moe-train").unlink()
    assert program.program() == ".venv/bin/python -m moe_train"


def test_an_extra_is_installed_by_the_script_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(program.__file__).parents[2]
    monkeypatch.chdir(root)
    assert program.runnable("needs gguf: bash launch/install.sh gguf") == "needs gguf: bash launch/install.sh gguf"
    monkeypatch.setattr(program, "__file__", "/site-packages/moe_train/machine/program.py")
    assert program.runnable("bash launch/install.sh gguf").endswith("-m pip install 'moe-train[gguf]'")
