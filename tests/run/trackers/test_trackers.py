"""Trackers of a run: refusals, identities that a resume keeps, and failures that leave the run alone.

No package is replaced: the processes are real, and what only a package can show is in the files of its own name.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from moe_train import config
from moe_train.run.trackers import trackers
from moe_train.run.trackers.tracker import TrackedRun

WANDB = config.WandbTracker(name="wandb", entity="team")
MLFLOW = config.MlflowTracker(name="mlflow")


def test_a_missing_package_and_a_missing_server_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # as its own runs leave it in the working directory
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", str(tmp_path)])
    with pytest.raises(ValueError, match=r"^metrics\.trackers names wandb, whose package is not installed; run: bash launch/ins"):
        trackers.check_trackers([WANDB])
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers.check_trackers([WANDB, MLFLOW])
    with pytest.raises(ValueError, match="mlflow is online, but the environment variable MLFLOW_TRACKING_URI names no server"):
        trackers.check_trackers([MLFLOW.model_copy(update={"online": True})])
    trackers.check_trackers([])


def test_a_resume_keeps_the_identities_and_a_new_run_has_new_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def start(is_new: bool) -> dict[str, TrackedRun]:
        return trackers.tracked_runs([WANDB, MLFLOW], tmp_path, "a", {"seed": 1}, is_new)

    first, resumed, new = start(True), start(False), start(True)
    assert first == resumed and first["wandb"].id != new["wandb"].id and first["wandb"].id != first["mlflow"].id
    assert first["wandb"].entity == "team" and first["mlflow"].config == {"seed": 1} and not first["mlflow"].online
    (tmp_path / "trackers.json").write_text("damaged")
    assert start(False)["wandb"].id != new["wandb"].id and "trackers begin new runs" in caplog.text
    assert trackers.tracked_runs([], tmp_path / "none", "a", {}, True) == {} and not (tmp_path / "none").exists()


def tracked(folder: Path) -> TrackedRun:
    folder.mkdir(parents=True)
    return TrackedRun("id", "a", "p", False, str(folder), {})


def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = trackers.Trackers({"unknown": tracked(tmp_path / "trackers" / "unknown")})  # its process ends with an error
    for step in range(100):
        opened.write("train", step, {"loss": 1.0})
    opened._processes[0]._process.wait(60)
    for thread in opened._processes[0]._threads:
        thread.join(10)
    opened.write("train", 101, {"loss": float("nan")})
    opened.close(is_finished=True)
    assert caplog.text.count("the tracker unknown has failed, and the run goes on without it: StopIteration") == 1
    assert "Traceback" in (tmp_path / "trackers" / "unknown.log").read_text()


def test_a_tracker_that_hangs_costs_no_time_and_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING", 10)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers.sys, "executable", str(Path(__file__).parent / "sleeper.sh"))
    opened = trackers.Trackers({"mlflow": tracked(tmp_path / "trackers" / "mlflow")})
    start = time.monotonic()
    for step in range(20_000):
        opened.write("train", step, {"loss": 1.0})
    assert time.monotonic() - start < 20
    opened.close(is_finished=True)
    assert caplog.text.count("is too slow, so metrics are left out there") == 1
    assert caplog.text.count("has not taken the last metrics within 0.2 s and was ended") == 1
    assert opened._processes[0]._process.poll() is not None


def test_what_a_process_is_told_is_json(tmp_path: Path) -> None:
    run = tracked(tmp_path / "t")
    assert TrackedRun(**json.loads(json.dumps(run._asdict()))) == run
