"""The process of a tracker: when it counts as finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.run.trackers import worker
from moe_train.run.trackers.tracker import TrackedRun

OPEN = json.dumps(TrackedRun("id", "a", "p", False, "folder", {})._asdict()) + "\n"


class Recorder:
    """Records what a tracker is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.finished: list[bool] = []

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.steps.append(step)

    def finish(self, is_finished: bool) -> None:
        self.finished.append(is_finished)


@pytest.mark.parametrize(
    ("last", "finished"),
    [('{"end": true}\n', True), ('{"end": false}\n', False), ("", False), ('{"step": 3, "sca', False)],
    ids=["finished", "stopped", "killed", "killed while writing"],
)
def test_a_run_that_dies_is_not_finished(monkeypatch: pytest.MonkeyPatch, last: str, finished: bool) -> None:
    recorder = Recorder()
    monkeypatch.setattr(worker, "open_tracker", lambda name, tracked: recorder)
    lines = [OPEN, *(json.dumps({"step": step, "scalars": {}}) + "\n" for step in (1, 2))]
    worker.work("wandb", [*lines, last] if last else lines)
    assert recorder.steps == [1, 2] and recorder.finished == [finished]


def test_every_tracker_of_the_config_has_its_file() -> None:
    folder = Path(worker.__file__).parent
    for name in ("wandb", "mlflow", "trackio"):
        assert (folder / f"{name}.py").is_file()
