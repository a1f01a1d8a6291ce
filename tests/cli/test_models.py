"""The commands for whole models: what they hand on, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_train.commands.export import ExportOptions
from tests.cli.command import run


def test_evaluate(stand_in, capsys) -> None:
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


CHECK = {"name": "tensors", "passed": True, "said": "3 tensors", "figures": {"tolerance": "bits"}, "seconds": 0.25}


def test_export(stand_in, capsys) -> None:
    handed_on: list[Any] = []

    def export(*arguments: Any) -> dict[str, Any]:
        handed_on.append(arguments)
        return {"tensors": {}, "checks": [CHECK], "serve": "serve it"}

    stand_in("moe_train.commands.export", export=export, ExportOptions=ExportOptions)
    assert run("export", "runs/tiny", "out", "--format", "peft", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"directory": "out", "checks": [CHECK], "serve": "serve it"}
    options = ("--dtype", "q8_0", "--for", "llama.cpp", "--proof", "tensors", "--max-shard-size", "1GB")
    assert run("export", "runs/tiny", "out", "--merge", *options) == 0
    shown = capsys.readouterr().out
    assert "3 tensors" in shown and "bits" in shown and "start the server: serve it" in shown
    assert run("export", "runs/tiny", "out") == 0
    stated = ExportOptions(dtype="q8_0", depth="tensors", server="llama.cpp", max_shard_size="1GB")
    directories = (Path("runs/tiny"), Path("out"))
    assert handed_on == [
        (*directories, "peft", False, ExportOptions()),
        (*directories, "gguf", True, stated),
        (*directories, "hf", False, ExportOptions()),
    ]


def test_verify(stand_in, capsys) -> None:
    found = [SimpleNamespace(**CHECK, to_json=lambda: CHECK)]
    stand_in("moe_train.commands.verify", verify=lambda directory, base, run, depth, adapter: ({}, found))
    assert run("verify", "out") == 0
    assert "3 tensors" in capsys.readouterr().out
    failed = {**CHECK, "passed": False, "said": "w has changed"}
    found[0] = SimpleNamespace(**failed, to_json=lambda: failed)
    assert run("verify", "out", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"directory": "out", "passed": False, "checks": [failed]}
    assert shown.err == "moe-train: out is not what was exported; these checks failed: tensors\n"
