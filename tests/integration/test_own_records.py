"""A run on records that the calling program holds: the losses of the same records in a file, also after a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.commands.train import train
from moe_train.run import loop
from tests.run_dir import events, lines


class Lines:
    """Lines of JSON in memory."""

    def __init__(self, lines: list[str], identity: str) -> None:
        self.lines = lines
        self.identity = identity

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return json.loads(self.lines[index])

    def where(self, index: int) -> str:
        return f"line {index}"


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run_dir)]


def test_a_run_on_own_records(small_run: Callable[..., config.Config], text: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 2, "checkpoint__every_steps": 1, "data__eval": []}
    of_file = small_run(tmp_path / "file", **changes)
    assert train(of_file) == loop.FINISHED
    records = (text / "train.jsonl").read_text().splitlines()

    def on(records: list[str], identity: str) -> config.Config:
        own = config.PythonSource(name="python", records=Lines(records, identity), record=config.TextRecord(name="text"))
        run = small_run(tmp_path / "own", **changes)
        assert run.data is not None
        return run.model_copy(update={"data": run.data.model_copy(update={"train": (own,)})})

    assert train(on(records, "1")) == loop.FINISHED
    assert losses(tmp_path / "own") == losses(tmp_path / "file")
    shutil.rmtree(tmp_path / "own/checkpoints/2")
    with pytest.raises(ValueError, match=r"the training data have changed since the run in .* was started"):
        train(on(records[1:], "2"))
    assert train(on(records, "1")) == loop.FINISHED
    assert losses(tmp_path / "own") == losses(tmp_path / "file")
    assert ("resume", 1) in [(event["event"], event["step"]) for event in events(tmp_path / "own")]
