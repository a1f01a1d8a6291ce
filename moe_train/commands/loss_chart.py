"""The losses of runs as a picture in SVG, without a plotting library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from moe_train.machine.files import write_text

_WIDTH, _HEIGHT = 460, 260
"""Size of one run's chart in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 36, 36
"""Margins around the axes in pixels."""


class Losses(NamedTuple):
    """The losses of one run."""

    title: str
    train: list[tuple[int, float]]
    """(step, loss) of every logged step."""
    held_out: list[tuple[int, float]]


def read_losses(run_dir: Path) -> Losses:
    """Read the losses of a run from its metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points: dict[str, list[tuple[int, float]]] = {"train": [], "eval": []}
    for line in lines:
        if line["kind"] in points:
            points[line["kind"]].append((line["step"], line["loss"]))
    return Losses(run_dir.name, points["train"], points["eval"])


def write_chart(runs: Sequence[Losses], file: Path) -> None:
    """Write one chart for each run, side by side: the training loss as a line, the held-out loss as dots with its values."""
    charts = [_chart(run, index * _WIDTH) for index, run in enumerate(runs)]
    size = f'width="{_WIDTH * len(runs)}" height="{_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    text = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect {size} fill="white"/>\n'
    write_text(file, text + "\n".join(charts) + "\n</svg>\n")


def _chart(run: Losses, offset: int) -> str:
    """Return the elements of one run's chart, moved right by `offset` pixels."""
    points = run.train + run.held_out
    last_step = max(step for step, _ in points) or 1
    low = min(loss for _, loss in points)
    span = max(loss for _, loss in points) - low or 1.0

    def place(step: int, loss: float) -> tuple[float, float]:
        x = _LEFT + step / last_step * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (1 - (loss - low) / span) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    elements = [f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(run.title)}: loss over steps</text>']
    for loss in (low, low + span / 2, low + span):
        _, y = place(0, loss)
        elements.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="#ddd"/>')
        elements.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" fill="#555">{loss:.2f}</text>')
    for step in (0, last_step):
        x, _ = place(step, low)
        elements.append(f'<text x="{x}" y="{_HEIGHT - 14}" text-anchor="middle" fill="#555">{step}</text>')
    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in run.train))
    elements.append(f'<polyline points="{line}" fill="none" stroke="#2266aa" stroke-width="1.5"/>')
    for step, loss in run.held_out:
        x, y = place(step, loss)
        elements.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#dd7711"><title>held-out loss {loss:.3f}</title></circle>')
    legend = '<tspan fill="#2266aa">training</tspan> <tspan fill="#dd7711">● held-out</tspan>'
    elements.append(f'<text x="{_WIDTH - _RIGHT}" y="20" text-anchor="end">{legend}</text>')
    return f'<g transform="translate({offset} 0)">\n' + "\n".join(elements) + "\n</g>"
