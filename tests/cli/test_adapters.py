"""The commands `adapters …`: what they hand on, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.command import run


class Moved(NamedTuple):
    """A matrix of a comparison."""

    module: str
    delta: float
    weight: float

    @property
    def relative(self) -> float:
        return self.delta / self.weight


class Comparison(NamedTuple):
    """What a comparison found."""

    base: str
    moved: list[Moved]

    def experts(self) -> list[list[float]]:
        return [[0.5]]


def test_diff(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    handed_on: list[Any] = []

    def diff(*arguments: Path | None) -> Comparison:
        handed_on.append(arguments)
        return Comparison("base", [Moved("head", 1.0, 2.0), Moved("embed", 1.0, 0.0)])

    stand_in("moe_train.commands.adapters", diff=diff, show=lambda found, top: [f"{len(found.moved)} of at most {top} [red]"])
    assert run("adapters", "diff", "one", "--base", "base", "--against", "two", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "base": "base",
        "moved": [
            {"module": "head", "delta": 1.0, "weight": 2.0, "relative": 0.5},
            {"module": "embed", "delta": 1.0, "weight": 0.0, "relative": None},
        ],
        "experts": [[0.5]],
    }
    assert run("adapters", "diff", "one", "--top", "3") == 0
    assert capsys.readouterr().out == "2 of at most 3 [red]\n"
    assert handed_on == [(Path("one"), Path("base"), Path("two")), (Path("one"), None, None)]


def test_merge(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    check = {"name": "merge", "passed": True, "said": "12 matrices", "figures": {}, "seconds": 0.5}
    handed_on: list[Any] = []

    def merge_into(*arguments: Any) -> dict[str, Any]:
        handed_on.append(arguments)
        return {"checks": [check]}

    stand_in("moe_train.commands.adapters", merge_into=merge_into)
    assert run("adapters", "merge", "base", "one", "out", "--dtype", "float32", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"directory": "out", "checks": [check]}
    assert run("adapters", "merge", "base", "one", "out") == 0
    assert "12 matrices" in capsys.readouterr().out
    paths = (Path("base"), Path("one"), Path("out"))
    assert handed_on == [(*paths, "float32"), (*paths, None)]


def test_scale(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in("moe_train.commands.adapters", scale=lambda adapter, factor, out: {"factor": factor, "out": f"{adapter} {out}"})
    assert run("adapters", "scale", "one", "0.5", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"factor": 0.5, "out": "one out"}
