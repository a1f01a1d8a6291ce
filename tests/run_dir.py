"""What a run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir)]


def events(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "run.json").read_text())["events"]


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())
