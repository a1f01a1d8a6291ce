"""`moe-train runs`: a table of runs, with the settings in which they differ and what they reached."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_train.checkpoint.metadata import survey
from moe_train.config.yaml_file import flat
from moe_train.machine.files import JsonObject
from moe_train.run.record import read_events
from moe_train.run.writer import parse_line

_IDENTITY = ("name", "run_dir")
"""Settings that differ between any two runs."""


class RunSummary(NamedTuple):
    """A run in the table."""

    run: str
    """Directory of the run."""
    settings: JsonObject
    """Settings by dotted key; those of the table are the ones in which runs differ."""
    status: str
    """`finished`, why it stopped, `running or killed`, or what is damaged."""
    figures: JsonObject
    """What it reached, ready for JSON; what is not known is None."""


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """Return the runs among directories and, for those that are none, below them.

    Raises:
        FileNotFoundError: A directory does not exist, or has no run.
    """
    runs: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such directory; name run_dirs, or a folder of them")
        found = [directory] if _is_run_folder(directory) else sorted(path.parent for path in directory.rglob("config.yaml"))
        found = [path for path in found if _is_run_folder(path)]
        if not found:
            raise FileNotFoundError(f"{directory} has no run: no folder with config.yaml and run.json; name another one")
        runs += [path for path in found if path not in runs]
    return runs


def _is_run_folder(path: Path) -> bool:
    # A checkpoint's own files are no run.
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()


def summarize_runs(directories: Sequence[Path], price: float | None = None) -> list[RunSummary]:
    """Summarize runs, with the settings in which they differ.

    Args:
        directories: run_dirs, or folders of them.
        price: dollars per device and hour; None if it is not known.
    """
    summaries = [_summarize(path, price) for path in find_runs(directories)]
    keys = sorted({key for summary in summaries for key in summary.settings})
    differing = []
    for key in keys:
        values = {repr(summary.settings.get(key)) for summary in summaries}
        if key not in _IDENTITY and len(values) > 1:
            differing.append(key)
    return [summary._replace(settings={key: summary.settings.get(key) for key in differing}) for summary in summaries]


def _summarize(path: Path, price: float | None) -> RunSummary:
    """Summarize one run; damage to its files is its status, so that the other runs are still listed."""
    try:
        settings = flat(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        events = read_events(path / "run.json")
        lines = _metrics(path / "metrics.jsonl")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return RunSummary(str(path), {}, f"damaged: {' '.join(str(error).split())[:200]}", {})
    start = next((event for event in events if event["event"] == "start"), {})
    last = events[-1] if events else {}
    status = "running or killed" if last.get("event") != "stop" else str(last.get("reason"))
    hours = _hours(events, path / "metrics.jsonl")
    devices = start.get("hardware", {}).get("devices")
    figures: JsonObject = {
        **_losses(lines),
        **_scores(path, lines),
        "tokens": _tokens(lines),
        "hours": hours,
        "cost": None if price is None or hours is None or devices is None else price * hours * devices,
        "base": (start.get("base") or {}).get("source"),
        "adapter": (start.get("adapter") or {}).get("source"),
    }
    return RunSummary(str(path), settings, status, figures)


def _metrics(path: Path) -> list[JsonObject]:
    """Return the lines of a metrics.jsonl, which may end in one that is being written."""
    if not path.is_file():
        return []
    return [parse_line(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _losses(lines: Sequence[JsonObject]) -> JsonObject:
    """Return the step, the last loss, and the lowest held-out loss with its step."""
    trained = [line for line in lines if line["kind"] == "train"]
    measured = [line for line in lines if line["kind"] == "eval" and line.get("loss") is not None]
    best = min(measured, key=lambda line: line["loss"], default=None)
    return {
        "step": max((line["step"] for line in lines), default=0),
        "loss": trained[-1].get("loss") if trained else None,
        "best_loss": None if best is None else best["loss"],
        "best_step": None if best is None else best["step"],
    }


def _scores(path: Path, lines: Sequence[JsonObject]) -> JsonObject:
    """Return the highest score on each suite, and the best checkpoint that is kept."""
    scores: JsonObject = {}
    for line in lines:
        if line["kind"] != "suite":
            continue
        for name, score in line.items():
            if name not in ("kind", "step", "not_graded") and score is not None:
                scores[name] = max(score, scores.get(name, score))
    return {"suites": scores, "best_checkpoint": survey(path).best()}


def _tokens(lines: Sequence[JsonObject]) -> int | None:
    """Return the number of tokens that were trained on, padding excluded: the mean of a step times the number of steps."""
    steps = [line for line in lines if line["kind"] == "train" and line.get("tokens_per_second") and line.get("seconds")]
    if not steps:
        return None
    mean = sum(line["tokens_per_second"] * line["seconds"] for line in steps) / len(steps)
    return round(mean * max(line["step"] for line in steps))


def _hours(events: Sequence[JsonObject], metrics: Path) -> float | None:
    """Return the time from each start to its stop; of a process that was killed, to its last metrics."""
    seconds = 0.0
    begun: datetime.datetime | None = None
    for event in events:
        time = datetime.datetime.fromisoformat(event["time"]) if "time" in event else None
        if time is None:
            return None
        if event["event"] == "stop":
            seconds += (time - begun).total_seconds() if begun else 0.0
            begun = None
        else:
            begun = time
    if begun is not None and metrics.exists():
        written = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC)
        seconds += max((written - begun).total_seconds(), 0.0)
    return seconds / 3600


MOST_SETTINGS = 4
"""Number of settings that have a column of their own in a table for people."""


def settings_rows(summaries: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Return a row for each run with the settings in which it differs from others, as text that fits into one column."""
    rows = []
    for summary in summaries:
        stated = [f"{key}={_short(value)}" for key, value in summary.settings.items() if value is not None]
        rows.append({"run": summary.run, "settings that differ": "  ".join(stated)})
    return rows


def _short(value: object) -> str:
    """Return a value of a setting on few characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def rows_of(summaries: Sequence[RunSummary], with_settings: bool = True) -> list[dict[str, Any]]:
    """Return a row for each run with the same columns, for a table or CSV: settings, figures, and a column for each suite."""
    suites = sorted({name for summary in summaries for name in summary.figures.get("suites", {})})
    columns = ("step", "loss", "best_loss", "best_step", "best_checkpoint", "tokens", "hours", "cost", "base", "adapter")
    rows = []
    for summary in summaries:
        settings = summary.settings if with_settings else {}
        row: dict[str, Any] = {"run": summary.run, **settings, "status": summary.status}
        for column in columns[:5]:
            row[column] = summary.figures.get(column)
        for suite in suites:
            row[suite] = summary.figures.get("suites", {}).get(suite)
        for column in columns[5:]:
            row[column] = summary.figures.get(column)
        rows.append(row)
    # A column without any value says nothing.
    named = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: "" if value is None else value for key, value in row.items() if key in named} for row in rows]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
