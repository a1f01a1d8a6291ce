"""What Weights & Biases writes without a network, read with its own reader. Needs the extra `wandb`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from tests.run.trackers.logged import SETTINGS, log_twice


def test_offline_files_hold_config_and_metrics_of_one_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = log_twice(tmp_path, config.WandbTracker(name="wandb", project="p"))
    assert not caplog.text
    files = sorted((tmp_path / "trackers" / "wandb").rglob(f"run-{identity}.wandb"))
    assert len(files) == 2  # one for each process, with the same identity
    settings, histories, exit_codes = zip(*map(_read, files), strict=True)
    assert settings[0] == settings[1] == SETTINGS and exit_codes == (1, 0)
    assert [row["step"] for row in histories[0]] == [1, 2, 3, 3] and [row["step"] for row in histories[1]] == [3, 4, 5, 5]
    assert histories[1][1] == {"step": 4, "loss/train": 2.5, **_ROUTER} and histories[1][-1]["held_out/loss"] == 1.5


_ROUTER = {
    **{"router/entropy": 0.5, "router/entropy/min": 0.25, "router/entropy/max": 0.75},
    **{"router/load/min": 0.5, "router/load/max": 1.5},
}


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The config, the history and the exit code in a file, from W&B's own store and messages."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    settings: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    code = -1
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for update in (*record.run.config.update, *record.config.update):
            name = update.key or ".".join(update.nested_key)
            if not name.startswith("_wandb"):
                settings[name] = json.loads(update.value_json)
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append({name: value for name, value in row.items() if not name.startswith("_")})
        if record.HasField("exit"):
            code = record.exit.exit_code
    return settings, history, code
