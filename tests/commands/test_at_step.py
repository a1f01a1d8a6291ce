"""The option --step."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.commands.at_step import at_step


def test_spellings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert at_step(run, None) == run
    assert at_step(run, "30") == tmp_path / "run@30" and at_step(run, "best") == tmp_path / "run@best"
    with pytest.raises(ValueError, match=r"--step 30 and .*run@best both name a checkpoint"):
        at_step(Path(f"{run}@best"), "30")
    with pytest.raises(FileNotFoundError, match="none: no such run"):
        at_step(tmp_path / "none", "30")
    with pytest.raises(ValueError, match="is no run; leave --step out"):
        at_step(tmp_path, "30")
    with pytest.raises(ValueError, match="names no checkpoint"):
        at_step(run, "last")
