"""The commands `data …`: their exit codes, what they print, and what they hand on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.commands.find_records import Found
from moe_train.commands.prepare import TeacherOptions
from moe_train.config import HuggingFaceTokenizer
from moe_train.data.records.search import Wanted
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.cli.command import run
from tests.data.check.samples import CHAT, KINDS, Write


def check(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `moe-train data check`."""
    code = run("data", "check", *arguments)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_check(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    clean, bad = write_lines("a.jsonl", KINDS[:1]), write_lines("b.jsonl", [{"text": 3}])
    code, out, _ = check(clean, "--tokenizer", tokenizer.path, capsys=capsys)
    assert code == 0 and "with problems" in out
    code, out, _ = check(clean, bad, "--tokenizer", tokenizer.path, "--seq-len", "64", "--batch-size", "2", capsys=capsys)
    assert code == 1 and f"{bad}:1: column 'text' should be text, not 3" in out and "steps of 2 rows" in out
    code, out, _ = check(bad, "--tokenizer", tokenizer.path, "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["problem_counts"] == {"type": 1}
    for arguments, said in (
        ((clean,), "state --tokenizer"),
        (("--tokenizer", tokenizer.path), "name either FILES, or with --config a run"),
        ((clean, "--tokenizer", clean.parent), "no tokenizer at"),
        ((clean.parent / "no.jsonl", "--tokenizer", tokenizer.path), "no file matches"),
    ):
        code, out, err = check(*arguments, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_check_on_a_run(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    code, out, err = check("--config", run_yaml, "--json", capsys=capsys)
    answer = json.loads(out)
    assert code == 0, err
    assert answer["truncation"]["examples_longer"] == 1 and answer["problems"] == []  # the run says truncate
    assert answer["packing"]["batch_size"] == 2 and answer["packing"]["rows"] == 2
    assert answer["overlap"]["records"] == 1


def test_check_imports_no_jax(tokenizer: HuggingFace, write_lines: Write) -> None:
    arguments = ["data", "check", str(write_lines("a.jsonl", KINDS[1:2])), "--tokenizer", str(tokenizer.path)]
    script = (
        "import sys\nfrom moe_train.cli.main import main\n"
        f"try:\n    main({arguments})\nfinally:\n    assert 'jax' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_what_is_not_read_is_said(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines("a.jsonl", [CHAT | {"id": n, "label": "x"} for n in range(3)])
    code, out, _ = check(path, "--tokenizer", tokenizer.path, capsys=capsys)
    assert code == 1 and "--ignore label" in out
    code, out, _ = check(path, "--tokenizer", tokenizer.path, "--ignore", "label", capsys=capsys)
    assert code == 0 and "id (3 records), label (3)" in out
    code, out, _ = check(path, "--tokenizer", tokenizer.path, "--ignore", "label", "--json", capsys=capsys)
    assert json.loads(out)["not_read"] == {"id": 3, "label": 3}


def test_a_dry_run_writes_nothing(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines("a.jsonl", [{"messages": [*CHAT["messages"], {"role": "user", "content": "?"}]}])
    _, out, _ = check(path, "--tokenizer", tokenizer.path, "--fix", path.parent / "out", "--dry-run", capsys=capsys)
    assert f"would be changed: {path}:1: 1 messages after the last answer cut off (last-turn)" in out
    assert "nothing was written" in out and list(path.parent.iterdir()) == [path]


def test_pairs_are_shown_side_by_side(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines("a.jsonl", [{"prompt": "Name a fruit.", "chosen": "Cherry.", "rejected": "Stone."}])
    assert run("data", "show", path, "--tokenizer", tokenizer.path) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "Cherry" in line and "Stone" in line]
    assert run("data", "show", path, "--tokenizer", tokenizer.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["chosen"] == [{"role": "assistant", "content": "Cherry."}]
    assert run("data", "show", path, "--tokenizer", tokenizer.path, "--map", "prompt=prompt", "--map", "completion=chosen") == 2
    assert "--ignore rejected" in capsys.readouterr().err
    both = ("--map", "prompt=prompt", "--map", "completion=chosen", "--ignore", "rejected")
    assert run("data", "show", path, "--tokenizer", tokenizer.path, *both) == 0


def test_show_needs_a_tokenizer(write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "show", write_lines("a.jsonl", KINDS)) == 2
    assert capsys.readouterr() == ("", "moe-train: state --tokenizer, which determines the tokens and the chat format\n")


def test_check_uses_the_tokenizer_of_the_run_that_training_starts_from(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def find_model_tokenizer(init_from: str) -> HuggingFaceTokenizer:
        asked.append(init_from)
        return HuggingFaceTokenizer(name="huggingface", path=str(tokenizer.path))

    monkeypatch.setattr("moe_train.commands.prepare.find_model_tokenizer", find_model_tokenizer)
    source = {"name": "files", "files": [str(write_lines("a.jsonl", [{"text": "2 + 3"}]))], "record": {"name": "text"}}
    settings = {
        "name": "r",
        "run_dir": str(tmp_path / "run"),
        "init_from": "runs/base",
        "data": {"train": [source]},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    code, out, err = check("--config", tmp_path / "run.yaml", "--json", capsys=capsys)
    assert (code, asked) == (0, ["runs/base"]), err
    assert json.loads(out)["records"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--config", "RUN", "--map", "text=a"], "--map would have no effect: the config states"),
        (["show", "FILE", "--step", "2", "--tokenizer", "TOKENIZER"], "--step would have no effect"),
        (
            ["show", "RUN", "--seq-len", "8", "--format", "json", "--tokenizer", "TOKENIZER"],
            "--seq-len and --format would have no effect",
        ),
        (["show", "FILE", "--html", "page.html", "--json"], "--json would have no effect: --html writes a page"),
    ],
)
def test_options_without_effect_are_refused(
    arguments: list[str],
    message: str,
    config_path: str,
    tokenizer: HuggingFace,
    write_lines: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"RUN": config_path, "FILE": str(write_lines("a.jsonl", KINDS)), "TOKENIZER": str(tokenizer.path)}
    assert run("data", *(paths.get(argument, argument) for argument in arguments)) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_prepare_and_trace_hand_on_the_run(
    stand_in: Callable[..., None], config_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(
        "moe_train.commands.prepare",
        TeacherOptions=TeacherOptions,
        prepare=lambda run, to, teacher, reference, features: {
            "teacher": teacher and str(teacher),
            "reference": reference,
            "features": features,
            "sets": [{"source": run.name, "path": to}],
            "steps": run.train.steps,
        },
        trace=lambda run, step, row: [{"file": run.name, "step": step, "row": row}],
    )
    assert run("data", "prepare", config_path, "train.steps=3", "--to", "gs://sets", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "sets": [{"source": "tiny", "path": "gs://sets"}],
        "steps": 3,
        "teacher": None,
        "reference": False,
        "features": False,
    }
    assert run("data", "prepare", config_path) == 0
    assert capsys.readouterr().out.split() == [
        "source",
        "path",
        "tiny",
        "null",
        "teacher",
        "null",
        "reference",
        "false",
        "features",
        "false",
        "steps",
        "10",
    ]
    assert run("data", "prepare", config_path, "--teacher", "big", "--top-k", "8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["teacher"] == str(TeacherOptions(Path("big"), (), None, 8))
    assert run("data", "trace", config_path, "--step", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"file": "tiny", "step": 2, "row": None}]


def test_find_and_erase(stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    handed_on: list[tuple[object, ...]] = []
    found = Found((), (), (Path("runs/one"),), ("runs/two: damaged",))

    def find_records(looked_for: Wanted, directories: list[Path]) -> Found:
        handed_on.append((looked_for.matches({"text": "Jane"}), directories))
        return found

    def erase_records(looked_for: Wanted, directories: list[Path], out: Path) -> dict[str, object]:
        handed_on.append((looked_for.sha256, directories, out))
        return {"files": {"a": "new/a"}, "erased": ["a:6"], "what_to_do": ["delete a"]}

    stand_in("moe_train.commands.find_records", find_records=find_records)
    stand_in("moe_train.commands.erase_records", erase_records=erase_records)
    assert run("data", "find", "jane") == 1
    assert "could not be searched: runs/two: damaged\n0 records in 0 of 1 runs" in capsys.readouterr().out
    assert run("data", "erase", "new", "--hash", "A" * 64, "--in", "one", "--in", "two") == 0
    assert "new: 1 files without 1 records: a:6\n- delete a" in capsys.readouterr().out
    assert handed_on == [(True, [Path("runs")]), ("a" * 64, [Path("one"), Path("two")], Path("new"))]
    assert run("data", "find") == 2 and "state either PATTERN" in capsys.readouterr().err
