"""What a run records of its data: the files, the epochs, and how long steps wait for batches."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.checkpoint.metadata import newest_metadata
from moe_train.commands.train import train
from moe_train.run import loop
from moe_train.run.inputs import open_inputs
from moe_train.run.resolve import resolve
from moe_train.train.objectives.next_token import next_token
from tests.run_dir import events, lines


def test_a_run_records_its_data_and_how_long_it_waits_for_them(small_run, tmp_path: Path, capfd) -> None:
    run = small_run(tmp_path / "run", train__steps=4, checkpoint__every_steps=4)
    assert train(run) == loop.FINISHED
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    about = newest_metadata(tmp_path / "run")
    assert about is not None and about.manifest == manifest["hash"] == manifest["sets"][0]["hash"]
    [event, *_] = events(tmp_path / "run")
    [(source, epochs)] = event["epochs"].items()
    assert source == manifest["sets"][0]["files"][0]["path"]
    rows = open_inputs(resolve(run, 8), next_token()).train.num_rows
    assert epochs == round(4 * 8 / rows, 3)
    assert f"4 steps = {epochs:.2f} epochs of {source}" in capfd.readouterr().err.replace("\n", "")
    waits = [step["input_wait"] for step in lines(tmp_path / "run")]
    assert len(waits) == 4 and all(0 <= wait < 1 for wait in waits)
