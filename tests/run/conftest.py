"""A run that several files look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.commands.train import train
from moe_train.run import loop


@pytest.fixture(scope="session")
def finished(small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("run")
    assert train(small_run(run_dir)) == loop.FINISHED
    return run_dir


@pytest.fixture
def after_two(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run as it was after step 2."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for done in (3, 4, 6):
        shutil.rmtree(run_dir / "checkpoints" / str(done))
    return run_dir
