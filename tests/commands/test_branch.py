"""A branch of a run takes the steps that the run itself would have taken, with settings of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.commands.branch import branch
from moe_train.commands.train import train
from moe_train.run import loop
from tests.run_dir import lines, losses, steps_in


def test_a_branch_decays_from_a_checkpoint(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    stable = tmp_path / "stable"
    assert train(small_run(stable, train__steps=4)) == loop.FINISHED
    assert branch(Path(f"{stable}@2"), tmp_path / "decay") == 2
    assert steps_in(tmp_path / "decay") == [2]
    schedule = {"name": "wsd", "decay_steps": 1}
    assert train(small_run(tmp_path / "decay", train__steps=4, optimizer__schedule=schedule)) == loop.FINISHED
    assert losses(tmp_path / "decay")[:3] == losses(stable)[:3]  # the next batch, from the same weights
    # Its third step still has the stable rate, and its fourth a rate of 0, which leaves the third step's weights as they are.
    assert losses(tmp_path / "decay")[3] == pytest.approx(losses(stable)[3], rel=1e-6)
    after_3, after_4 = (line["loss"] for line in lines(tmp_path / "decay", "eval")[-2:])
    assert after_3 == after_4 == pytest.approx(lines(stable, "eval")[-2]["loss"], rel=1e-6)
    # Step 3 was the best so far when it was measured.
    assert steps_in(tmp_path / "decay") == steps_in(stable) == [2, 3, 4]
    with pytest.raises(FileExistsError):
        branch(stable, tmp_path / "decay")
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 1 that can be read; it has 2, 3, 4"):
        branch(Path(f"{stable}@1"), tmp_path / "third")
    shutil.rmtree(stable / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no run with checkpoints"):
        branch(stable, tmp_path / "none")
