"""A sweep: runs are trained one after the other, and compared with the first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.commands import sweep_runs
from moe_train.commands.runs import RunSummary
from moe_train.commands.sweep import SweptRun
from moe_train.commands.sweep_runs import compare_runs, train_runs

RUNS: Any = [SweptRun([], SimpleNamespace(run_dir=f"runs/{name}", name=name)) for name in ("a", "b", "c")]  # type: ignore[arg-type]


def test_a_run_that_does_not_finish_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train_run(run: Any) -> int:
        trained.append(run.name)
        return 75 if run.name == "b" else 0

    monkeypatch.setattr(sweep_runs, "resolve", lambda config, devices: config)
    monkeypatch.setattr(sweep_runs, "join_processes", lambda: None)
    monkeypatch.setattr(sweep_runs.loop, "train_run", train_run)
    assert train_runs(RUNS) == 75 and trained == ["a", "b"]


def test_comparison_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_suites(first: Path, suites: list[Path], comparisons: Any) -> dict[str, Any]:
        assert str(first) == "runs/a@best" and [str(path) for path in comparisons.against] == ["runs/b@best", "runs/c"]
        row = {"suite": "kpi", "against": "runs/c", "old": 0.75, "new": 0.5, "difference": -0.25, "low": -0.5, "high": -0.125}
        return {"suites": [], "comparisons": [{**row, "not_graded": 0, "p_value": 0.01, "verdict": "worse", "method": "m"}]}

    best = {"a": 4, "b": 2, "c": None}
    summaries = [RunSummary(f"runs/{name}", {}, "finished", {"best_checkpoint": step}) for name, step in best.items()]
    monkeypatch.setattr(sweep_runs, "summarize_runs", lambda directories: summaries)
    monkeypatch.setattr(sweep_runs, "evaluate_suites", evaluate_suites)
    table, result = compare_runs(RUNS, [Path("kpi.yaml")])
    assert [row["run"] for row in table] == ["runs/a", "runs/b", "runs/c"]
    (row,) = result["comparisons"]
    assert (row["run"], row["against"], row["verdict"]) == ("runs/c", "runs/a@best", "better")
    assert (row["difference"], row["low"], row["high"]) == (0.25, 0.125, 0.5)
    assert compare_runs(RUNS, []) == (table, {})
