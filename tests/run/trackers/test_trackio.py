"""What Trackio writes without a server, read with its own storage. Needs the extra `trackio`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import config
from tests.run.trackers.logged import SETTINGS, log_twice

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
[name] = SQLiteStorage.get_runs("p")
print(json.dumps([name, SQLiteStorage.get_run_config("p", name), SQLiteStorage.get_logs("p", name)], default=str))
"""


@pytest.mark.slow
def test_the_database_holds_one_run_with_config_and_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:1/?write_token=a")  # must not be used: the tracker is not online
    identity = log_twice(tmp_path, config.TrackioTracker(name="trackio", project="p"))
    assert not caplog.text
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackers" / "trackio"))
    # A process of its own, since Trackio reads its folder when it is imported.
    answer = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True).stdout
    name, settings, logs = json.loads(answer.splitlines()[-1])
    assert name == f"tiny-{identity}" and {key: settings[key] for key in SETTINGS} == SETTINGS
    losses = {(row["step"], row["loss/train"]) for row in logs if "loss/train" in row}
    assert losses == {(step, 10.0 / step) for step in range(1, 6)}
    assert [row["held_out/loss"] for row in logs if "held_out/loss" in row] == [1.5, 1.5]
