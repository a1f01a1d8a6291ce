"""The commands for whole models, but for evaluate: what they hand on, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.commands.export import ExportOptions
from moe_train.commands.generate import GeneratedText, GenerationRequest
from tests.cli.command import run

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


def test_step(stand_in, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    runs: list[Path] = []

    def export(source: Path, *_: Any) -> dict[str, Any]:
        runs.append(source)
        return {"checks": []}

    def verify(directory: Path, base: Path | None, run: Path | None, *_: Any) -> tuple[dict[str, Any], list[Any]]:
        assert run is not None
        runs.append(run)
        return {}, []

    def diff(adapter: Path, *_: Any) -> Any:
        runs.append(adapter)
        return SimpleNamespace(to_json=dict)

    def generate(directory: Path, _: GenerationRequest) -> list[GeneratedText]:
        runs.append(directory)
        return [GeneratedText(0, "", [], [], "max_tokens")]

    stand_in("moe_train.commands.export", export=export, ExportOptions=ExportOptions)
    stand_in("moe_train.commands.verify", verify=verify)
    stand_in("moe_train.commands.verify_answers", verify_answers=None)
    stand_in("moe_train.commands.compare_adapters", diff=diff, comparison_tables=None)
    monkeypatch.setattr("moe_train.commands.generate.generate", generate)
    tuned = tmp_path / "tuned"
    (tuned / "checkpoints").mkdir(parents=True)
    assert run("export", tuned, "out", "--step", "30", "--json") == 0
    assert run("verify", "out", "--run", tuned, "--step", "best", "--json") == 0
    assert run("adapters", "diff", tuned, "--step", "newest", "--json") == 0
    assert run("generate", tuned, "--prompt", "x", "--step", "30") == 0
    assert [path.name for path in runs] == ["tuned@30", "tuned@best", "tuned@newest", "tuned@30"]
    capsys.readouterr()
    assert run("verify", "out", "--step", "best") == 2 and "name that with --run" in capsys.readouterr().err
    assert run("export", tmp_path, "out", "--step", "best") == 2 and "is no run; leave --step out" in capsys.readouterr().err


def test_evidence(stand_in, capsys) -> None:
    handed_on: list[Any] = []

    def note(name: str, answer: Any) -> Any:
        return lambda *arguments: handed_on.append((name, *arguments)) or answer

    def result(passed: bool) -> SimpleNamespace:
        return SimpleNamespace(name="raw data", passed=passed, to_json=lambda: {**CHECK, "passed": passed})

    stand_in(
        "moe_train.commands.evidence",
        StatedFigures=lambda *figures: figures,
        write_evidence=note("write", {"directory": "out"}),
        seal_evidence=note("seal", {"directory": "out"}),
        check_evidence=note("check", [result(False)]),
    )
    assert run("evidence", "runs/tiny", "out", "--power", "300", "--key", "k.pem") == 0
    assert run("evidence", "--seal", "out") == 0
    assert run("evidence", "--check", "out", "--key", "k.pub") == 1
    assert "out no longer matches the files; these checks failed: raw data" in capsys.readouterr().err
    assert handed_on == [
        ("write", Path("runs/tiny"), Path("out"), None, (None, 300.0), Path("k.pem")),
        ("seal", Path("out"), None),
        ("check", Path("out"), Path("k.pub")),
    ]
    for wrong in (["evidence", "runs/tiny"], ["evidence", "--check", "out", "other"], ["evidence", "--check", "--seal", "out"]):
        assert run(*wrong) == 2
