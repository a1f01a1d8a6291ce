"""The table of runs, from the files that runs leave."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.runs import RunSummary, as_csv, find_runs, rows_of, settings_rows, summarize_runs

METRICS = [
    {"kind": "eval", "step": 0, "loss": 3.0},
    {"kind": "train", "step": 1, "loss": 2.5, "seconds": 2.0, "tokens_per_second": 50.0},
    {"kind": "train", "step": 2, "loss": 2.0, "seconds": 1.0, "tokens_per_second": 100.0},
    {"kind": "eval", "step": 2, "loss": 2.25},
    {"kind": "suite", "step": 2, "kpi": 0.5},
    {"kind": "eval", "step": 4, "loss": 2.5},
    {"kind": "suite", "step": 4, "kpi": 0.25},
]


def write_run(folder: Path, rate: float, stop: str | None = "finished", metrics: list[dict[str, Any]] = METRICS) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nrun_dir: {folder}\noptimizer: {{learning_rate: {rate}}}\n")
    start = {"event": "start", "step": 0, "time": "2026-11-01T10:00:00+00:00", "hardware": {"devices": 8}, "base": {"source": "m"}}
    events = [start]
    if stop is not None:
        events.append({"event": "stop", "step": 4, "time": "2026-11-01T11:30:00+00:00", "reason": stop})
    (folder / "run.json").write_text(json.dumps({"events": events}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"kind": "tr')
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1e-3)
    write_run(tmp_path / "b", 3e-3, None, METRICS[:3])
    first, second = summarize_runs([tmp_path], price=2.0)
    assert (first.settings, second.settings) == ({"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 3e-3})
    assert (first.status, second.status) == ("finished", "running or killed")
    expected = {"step": 4, "loss": 2.0, "best_loss": 2.25, "best_step": 2, "suites": {"kpi": 0.5}, "tokens": 200, "hours": 1.5}
    assert expected.items() <= first.figures.items()
    assert first.figures["cost"] == 24 and first.figures["base"] == "m" and first.figures["best_checkpoint"] is None
    assert second.figures["best_loss"] == 3.0 and second.figures["hours"] >= 0
    rows = rows_of([first, second])
    assert rows[0]["kpi"] == 0.5 and rows[1]["kpi"] == "" and "adapter" not in rows[0]
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [row["optimizer.learning_rate"] for row in read] == ["0.001", "0.003"]


def test_many_settings_stand_in_one_column() -> None:
    settings = {"lora.targets": [{"modules": ["attention.*", "ffn.*"], "rank": 16, "alpha": 32}] * 2, "name": "b", "seed": None}
    (row,) = settings_rows([RunSummary("runs/a", settings, "finished", {})])
    assert row["settings that differ"].endswith("...  name=b") and len(row["settings that differ"]) < 90
    assert "name" not in rows_of([RunSummary("runs/a", settings, "finished", {"step": 3})], with_settings=False)[0]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1e-3)
    (write_run(tmp_path / "b", 3e-3) / "run.json").write_text("{}")
    first, second = summarize_runs([tmp_path])
    assert first.status == "finished" and first.figures["cost"] is None
    assert second.status.startswith("damaged: ") and "run.json" in second.status
    assert [row["run"] for row in rows_of([first, second])] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no run"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_runs([tmp_path / "none"])
    run = write_run(tmp_path / "a", 1e-3)
    assert find_runs([run, tmp_path]) == [run]
