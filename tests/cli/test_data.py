"""The commands `data check` and `data show`: arguments, exit codes, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import KINDS, Write


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main.main(["data", "check", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


def test_the_command(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    clean, bad = write_lines("a.jsonl", KINDS), write_lines("b.jsonl", [{"text": 3}])
    code, out, _ = run(clean, "--tokenizer", tokenizer.path, capsys=capsys)
    assert code == 0 and "with problems" in out
    code, out, _ = run(clean, bad, "--tokenizer", tokenizer.path, "--seq-len", "64", "--batch-size", "2", capsys=capsys)
    assert code == 1 and f"{bad}:1: column 'text' should be text, not 3" in out and "steps of 2 rows" in out
    code, out, _ = run(bad, "--tokenizer", tokenizer.path, "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["problem_counts"] == {"type": 1}
    for arguments, said in (
        ((clean,), "state --tokenizer"),
        (("--tokenizer", tokenizer.path), "name files, or a run with --config"),
        ((clean, "--tokenizer", clean.parent), "no tokenizer at"),
        ((clean.parent / "no.jsonl", "--tokenizer", tokenizer.path), "no file matches"),
    ):
        code, out, err = run(*arguments, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_the_command_on_a_run(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines("a.jsonl", [{"ask": "2 + 3?", "say": "5 " * 100}, {"ask": "2 + 3?", "say": "5"}])
    held_out = write_lines("e.jsonl", [{"text": "5 " * 50}])
    run_yaml = tmp_path / "run.yaml"
    settings = {
        "name": "r",
        "run_dir": str(tmp_path / "runs"),
        "init_from": str(tmp_path),
        "data": {
            "tokenizer": {"name": "huggingface", "path": str(tokenizer.path)},
            "train": [
                {
                    "name": "files",
                    "files": [str(path)],
                    "record": {"name": "completion", "prompt": "ask", "completion": "say", "too_long": "truncate"},
                }
            ],
            "eval": [{"name": "files", "files": [str(held_out)], "record": {"name": "text"}}],
        },
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    }
    run_yaml.write_text(json.dumps(settings))
    code, out, err = run("--config", run_yaml, "--json", capsys=capsys)
    answer = json.loads(out)
    assert code == 0, err
    assert answer["truncation"]["examples_longer"] == 1 and answer["problems"] == []  # the run says truncate
    assert answer["packing"]["batch_size"] == 2 and answer["packing"]["rows"] == 2
    assert answer["overlap"]["records"] == 1


def test_no_jax_is_imported(tokenizer: HuggingFace, write_lines: Write) -> None:
    arguments = ["data", "check", str(write_lines("a.jsonl", KINDS)), "--tokenizer", str(tokenizer.path)]
    script = (
        "import sys\nfrom moe_train.cli.main import main\n"
        f"try:\n    main({arguments})\nfinally:\n    assert 'jax' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
