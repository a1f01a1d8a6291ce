"""Options of `synthesize` that contradict each other, and what `improve` prints and exits with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "pairs", "--n", "1"], "--as pairs compares answers"),
        (["--temperature", "0"], "all answers to a question are equal"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", "items.jsonl", "--teacher", "model", "--out", "out", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "code"),
    [({"passed": True, "exit_code": 0}, 0), ({"passed": False, "exit_code": 0}, 3), ({"exit_code": 75}, 75)],
)
def test_rounds_end_with_the_code_of_the_last(
    last: dict[str, Any], code: int, stand_in: Callable[..., None], config_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def improve(rounds: Any, options: Any, suite_options: Any) -> Iterator[dict[str, Any]]:
        assert (rounds["count"], rounds["start"], options.samples, options.grader) == (2, Path("tuned"), 6, "number")
        yield {"round": 1, "kpi": 0.5, "passed": True, "exit_code": 0}
        yield {"round": 2, "kpi": 0.5, **last}

    def rounds(*values: Any) -> dict[str, Any]:
        names = ("config_path", "overrides", "questions", "suites", "requirements", "out", "count", "start")
        return dict(zip(names, values, strict=True))

    stand_in("moe_train.commands.improve", Rounds=rounds, improve=improve)
    options = ["--questions", "items.jsonl", "--suite", "kpi.yaml", "--require", "kpi >= base", "--out", "out"]
    options += ["--rounds", "2", "--start", "tuned", "--n", "6", "--keep", "number"]
    assert run("improve", config_path, *options, "--json") == code
    assert [row["round"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    assert run("improve", config_path, *options) == code
    # A round whose training was stopped has no scores, and is not in the table.
    assert capsys.readouterr().out.count("0.5") == 1 + ("passed" in last)
