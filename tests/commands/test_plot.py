"""Pictures of runs: what is drawn, and what is said where there is nothing to draw."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.plot import plot, read_run_metrics


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "loss": 3.0, "routing_drift": [0.1, 0.2]}]
    for step in range(1, 13):
        load = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]
        figures = {
            "loss": 3 / step,
            "tokens_per_second": None if step == 1 else 90.0,
            "grad_norm": 1.0,
            "balance": 1.5,
            "load": load,
        }
        lines.append({"kind": "train", "step": step, **figures})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (folder / "run.json").write_text(json.dumps({"events": [{"event": "start", "step": 0}, {"event": "resume", "step": 6}]}))
    return folder


def test_a_run_is_read_up_to_the_line_that_is_being_written(run_dir: Path) -> None:
    story = read_run_metrics(run_dir)
    assert [line["step"] for line in story.train] == [*range(1, 13)] and len(story.evaluations) == 1 and story.resumed == [6]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_runs_become_a_picture(run_dir: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: the extra report")
    out = tmp_path / f"runs{suffix}"
    out.write_text("an older one")
    plot([run_dir, run_dir], out)
    assert out.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", out.name]


def test_what_cannot_be_drawn_is_said_in_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a\.gif has an unsupported format; use a name that ends in \.png, \.svg, \.pdf"):
        plot([run_dir], tmp_path / "a.gif")
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl; state the run_dir of a run"):
        read_run_metrics(tmp_path)
    (run_dir / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "loss": 3.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no metrics of a training step yet"):
        read_run_metrics(run_dir)
    (run_dir / "metrics.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        read_run_metrics(run_dir)
    (run_dir / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not the metrics of a step"):
        read_run_metrics(run_dir)
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 3.0}\n')
    (run_dir / "run.json").write_text('{"events": [1]}')
    with pytest.raises(ValueError, match=r"run\.json is not the log of a run"):
        read_run_metrics(run_dir)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plots need matplotlib, which is not installed; run: bash launch/install\.sh report"):
        plot([run_dir], tmp_path / "a.png")
