"""The command evaluate: what it hands on, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.commands.evaluate_suite import Comparisons, Outputs, SuiteOptions, judge_at
from tests.cli.command import run


def test_loss(stand_in, capsys) -> None:
    given: list[Any] = []

    def evaluate_model(directory: Path, files: list[Path], chat_template: str | None) -> dict[str, float]:
        given.append((directory, files, chat_template))
        return {"loss": 2.5, "tokens": 1000}

    stand_in("moe_train.commands.evaluate", evaluate_model=evaluate_model)
    assert run("evaluate", "runs/tiny", "--data", "a.jsonl", "--data", "b.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 2.5, "tokens": 1000}
    assert given == [(Path("runs/tiny"), [Path("a.jsonl"), Path("b.jsonl")], None)]
    assert run("evaluate", "runs/tiny", "--data", "a.jsonl", "--chat-template", "chatml") == 0 and given[1][2] == "chatml"
    assert capsys.readouterr().out.split() == ["loss", "2.5", "tokens", "1,000"]


def test_suites(stand_in, tmp_path: Path, capsys) -> None:
    given: list[Any] = []
    result = {
        "weights": [],
        "suites": [
            {"suite": "kpi", "model": "m", "score": 0.5, "categories": {"tides": 0.25}, "digest": "d"},
            {"suite": "text", "model": "m", "score": 0.5, "categories": {}, "digest": "d", "perplexity": 3.5},
        ],
        "comparisons": [],
        "requirements": [],
        "passed": False,
    }

    def evaluate_suites(*arguments: Any) -> dict[str, Any]:
        given.append(arguments)
        return result

    stand_in(
        "moe_train.commands.evaluate_suite",
        evaluate_suites=evaluate_suites,
        Comparisons=Comparisons,
        Outputs=Outputs,
        SuiteOptions=SuiteOptions,
        judge_at=judge_at,
    )
    (tmp_path / "checkpoints").mkdir()
    options = ("--suite", "kpi.yaml", "--against", "base", "--require", "kpi >= base", "--grader", "g.py", "--suite-data", "d")
    judged = ("--judge", "http://h/v1", "--judge-cache", "c", "--seed-run", "r2", "--out", "o", "--step", "3")
    assert run("evaluate", tmp_path, "limit=5", *options, *judged) == 3
    directory, files, comparisons, template, suite_options, outputs = given[0]
    assert (directory.name, files, template) == (f"{tmp_path.name}@3", [Path("kpi.yaml")], None)
    assert comparisons == Comparisons([Path("base")], ["kpi >= base"], [Path("r2")])
    assert suite_options == SuiteOptions(["limit=5"], Path("d"), [Path("g.py")], judge_at("http://h/v1", Path("c")))
    assert outputs == Outputs(Path("o"), None)
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "tides" in printed and "digest" not in printed
    assert run("evaluate", "m", "--suite", "kpi.yaml", "--json") == 3
    assert json.loads(capsys.readouterr().out) == result


def test_what_does_not_go_together(capsys) -> None:
    for arguments, message in (
        ((), "state --data FILE for the loss on files, --suite"),
        (("--data", "a", "--suite", "b"), "state --data FILE for the loss on files, --suite"),
        (("--data", "a", "--against", "b"), "--against and --require have no effect on --data; state --suite"),
        (("limit=3", "--data", "a"), "have no effect without --suite"),
        (("--suite", "b", "--limit", "3"), "have no effect without --lm-eval"),
        (("--lm-eval", "a"), "--lm-eval needs --include-path"),
        (("--lm-eval", "a", "--seed-run", "b"), "have no effect without --suite"),
        (("--suite", "b", "--judge-cache", "c"), "--judge-cache has no effect without --judge"),
    ):
        assert run("evaluate", "runs/tiny", *arguments) == 2
        assert message in capsys.readouterr().err
