"""What Weights & Biases writes without a network, read with its own messages. Needs the extra `wandb`.

The file is a log of records as in LevelDB; 0.31 has no reader of it in Python.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
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


def _records(file: Path) -> Iterator[bytes]:
    """Yield the records of a log: after 7 bytes of identity, blocks of 32 KiB with parts of (checksum, length, kind, content)."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        left_in_block = -position % 32768 or 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:  # the rest of the block is empty
            position += left_in_block
            continue
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The config, the history and the exit code in a file."""
    from wandb.proto import wandb_internal_pb2

    settings: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    code = -1
    for data in _records(file):
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
