"""A wheel holds all that the commands need: it works without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "moe_train", "configs", "launch")


@pytest.mark.slow
def test_a_wheel_works_without_a_checkout(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    # A copy, since building leaves folders in the source.
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, checkout / name)
    # By way of a source distribution, so that both are tried.
    build_sdist = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build_sdist], cwd=checkout, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(checkout)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for arguments in (["recipes"], ["recipes", "tool_dialogue_chatml", "--copy", "run.yaml"], ["explain", "lora"], ["schema"]):
        command = [sys.executable, "-m", "moe_train", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout
    assert (tmp_path / "run.yaml").is_file() and (tmp_path / "tool_dialogue.jsonl").is_file()
