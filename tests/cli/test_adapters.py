"""The commands `adapters …`: what they hand on, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.command import run


class Comparison(NamedTuple):
    """A stand-in for the result of a comparison."""

    modules: list[str]

    def to_json(self) -> dict[str, list[str]]:
        return {"moved": self.modules}


def test_diff(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    handed_on: list[Any] = []

    def diff(*arguments: Path | None) -> Comparison:
        handed_on.append(arguments)
        return Comparison(["head", "embed"])

    def comparison_tables(comparison: Comparison, top: int) -> list[str]:
        return [f"{len(comparison.modules)} of at most {top} [red]"]

    stand_in("moe_train.commands.compare_adapters", diff=diff, comparison_tables=comparison_tables)
    assert run("adapters", "diff", "one", "--base", "base", "--against", "two", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"moved": ["head", "embed"]}
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
    assert handed_on == [(*paths, "float32", False), (*paths, None, False)]


def test_scale(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in("moe_train.commands.adapters", scale=lambda adapter, factor, out: {"factor": factor, "out": f"{adapter} {out}"})
    assert run("adapters", "scale", "one", "0.5", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"factor": 0.5, "out": "one out"}
