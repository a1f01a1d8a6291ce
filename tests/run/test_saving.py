"""When a run saves, and what is left when a save fails."""

from __future__ import annotations

import math
import resource
from types import SimpleNamespace

import pytest

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.commands.train import train
from moe_train.run import loop
from moe_train.run.saving import Saving
from moe_train.run.writer import Writer
from tests.run_dir import lines, steps_in


def test_saves_every_so_many_minutes(tmp_path, small_run):
    run = small_run(
        tmp_path, checkpoint={"every_steps": 1000, "every_minutes": 1e-6, "keep_last": 100, "keep_best": False}, data__eval=[]
    )
    assert train(run) == loop.FINISHED
    assert steps_in(tmp_path) == [2, 4, 6]  # agreed one step late, then the clock starts again
    assert not lines(tmp_path, "eval")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads, cut short
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(after_two, small_run, monkeypatch, capfd):
    """Files cannot grow past 4 kB from the figures of step 3 on: neither the checkpoint nor metrics.jsonl fit."""
    write, limits = Writer.train, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    monkeypatch.setattr(Writer, "train", fill_the_disk)
    run = small_run(after_two, data__eval=[])
    try:
        with pytest.raises(RuntimeError, match=r"could not save a checkpoint in .*; the checkpoint of step 2 is intact$"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (after_two / "checkpoints").iterdir()] == ["2"]
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    assert train(run) == loop.FINISHED


@pytest.fixture
def saving(small_run, tmp_path, monkeypatch):
    """`saving(**settings)` of a run of 6 steps whose best loss so far is 2."""

    def make(**settings):
        monkeypatch.setattr(manager, "best_rank", lambda checkpoints: 2.0)
        run = config.run_of(small_run(tmp_path, checkpoint=settings))
        return Saving(run, checkpoints=None, begin=SimpleNamespace(checkpoint_step=None), inputs=SimpleNamespace(total_steps=6))

    return make


def test_the_last_step_and_every_so_many_are_saved(saving):
    assert [step for step in range(1, 7) if saving(every_steps=4).is_due(step)] == [4, 6]
    assert not saving(every_steps=4).is_overdue()  # without every_minutes


def test_a_loss_is_the_best_only_if_it_is_lower(saving):
    kept = saving(every_steps=4, keep_best=True)
    assert [kept.is_best(loss) for loss in (None, math.nan, 2.0, 1.5, 1.5, 1.25)] == [False, False, False, True, False, True]
    assert not saving(every_steps=4, keep_best=False).is_best(1.0)
