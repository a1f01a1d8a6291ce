"""The command line: what it imports, what it hands on, what it prints, and how it exits."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import typer

from moe_train.cli import main
from moe_train.config import Config
from tests.cli.command import run

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "doctor",
    "train",
    "inspect",
    "evaluate",
    "generate",
    "chat",
    "export",
    "verify",
    "upcycle",
    "bench",
    "tokenizer",
    "schema",
    "recipes",
    "explain",
    "convert",
    "quickstart",
]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["tokenizer", "train"]], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom moe_train.cli.main import main\ntry:\n    main([*sys.argv[1:], '--help'])\nfinally:\n"
        "    heavy = {'jax', 'numpy', 'flax', 'orbax', 'datasets', 'tokenizers', 'moe_train.config'} & set(sys.modules)\n"
        "    print('heavy:', *sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert "Usage: moe-train" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


def leaf_commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the name and the object of every command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaf_commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


LEAF_COMMANDS = dict(leaf_commands(typer.main.get_command(main.app)))


WITHOUT_PROGRAMS = {
    "schema",
    "runs",
    "recipes",
    "explain",
    "convert",
    "tokenizer train",
    "inspect",
    "plot",
    "report",
    "doctor",
    "adapters scale",
    "branch",
    "evidence",
}
"""Commands that compile nothing, besides those of data."""


@pytest.mark.parametrize("name", LEAF_COMMANDS)
def test_every_command_that_compiles_uses_the_cache(name: str) -> None:
    uses_it = "use_compile_cache(" in inspect.getsource(LEAF_COMMANDS[name].callback)
    assert uses_it == (name not in WITHOUT_PROGRAMS and not name.startswith("data "))


def test_no_compile_cache_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--no-compile-cache", "schema"], ["schema", "--no-compile-cache"]):
        monkeypatch.setenv("MOE_TRAIN_COMPILE_CACHE", "folder")
        assert run(*arguments) == 0
        assert os.environ["MOE_TRAIN_COMPILE_CACHE"] == "off"


@pytest.mark.parametrize("name", LEAF_COMMANDS)
def test_help_ends_with_examples_that_the_command_accepts(name: str) -> None:
    title, *examples = LEAF_COMMANDS[name].epilog.split("\n\n")
    assert title in ("Example:", "Examples:") and 1 <= len(examples) <= 3
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert example.startswith(f"moe-train {name}")
        arguments = words[1 + len(name.split()) :]
        LEAF_COMMANDS[name].make_context(name, arguments)  # raises a usage error for a wrong argument
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("configs/"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["expotr"], "No such command 'expotr'. Did you mean 'export'"),
        (["train"], "Missing argument 'CONFIG'; see moe-train train --help"),
        (["generate", "x", "--prompt", "a", "--max-token", "3"], "No such option: --max-token (Possible options: --max-tokens)"),
        (["plan", "x", "--topology", "v5p-8", "--price", "-1"], "Invalid value for '--price': "),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"moe-train: {said}") and len(error.splitlines()) == 1 and not out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("mesh.expert 3 does not divide num_experts 8"), 2, "moe-train: mesh.expert 3 does not divide num_experts 8\n"),
        (FileNotFoundError("a.jsonl: no such file"), 2, "moe-train: a.jsonl: no such file\n"),
        (ConnectionError("s3://a cannot be reached"), 75, "moe-train: s3://a cannot be reached\n"),
        (FileExistsError("out exists"), 2, "moe-train: out exists\n"),
        (OSError(28, "No space left on device", "step_5"), 1, "moe-train: step_5: No space left on device\n"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Gloo context initialization\n failed: Connect timeout"),
            75,
            "moe-train: the processes lost touch with each other: INTERNAL: Gloo context initialization failed: Connect timeout; "
            "start again to continue\n",
        ),
        (RuntimeError("4 steps in a row were not finite"), 1, "moe-train: 4 steps in a row were not finite\n"),
    ],
)
def test_an_error_is_one_line(stand_in, config_path: str, capsys, error: Exception, code: int, said: str) -> None:
    def train(resolved: Config) -> int:
        raise error

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path) == code
    assert capsys.readouterr() == ("", said)
    assert run("train", config_path, "--debug") == code
    assert capsys.readouterr().err.startswith("Traceback")


def test_an_unforeseen_error_shows_its_traceback(stand_in, config_path: str, capsys) -> None:
    def train(resolved: Config) -> int:
        return {}["no such key"]

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("moe-train: KeyError: 'no such key'\n")


def test_bad_configs_end_with_2_and_their_lines(config_path: str, tmp_path: Path, capsys) -> None:
    assert run("train", str(tmp_path / "none.yaml")) == 2
    assert capsys.readouterr().err == f"moe-train: {tmp_path}/none.yaml: no such config file\n"
    assert run("train", config_path, "train.step=3", "seed=x") == 2
    assert capsys.readouterr().err.splitlines() == [
        'moe-train: override seed=x: seed: has to be a whole number (value "x")',
        "moe-train: override train.step=3: train.step: unknown key; did you mean steps? (value 3)",
    ]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_train", "bench", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"moe-train: {tmp_path}: is a folder, not a config file; state a YAML file, ")


def test_usage_errors_end_with_2(config_path: str, capsys) -> None:
    assert run("train") == 2
    assert run("generate", "runs/tiny") == 2
    assert run("export", "runs/tiny", "out", "--format", "onnx") == 2
    assert run("fly") == 2
    assert run("plan", config_path, "--topology", "v5p:4x4x4", "--price", "-1") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 5
    assert said.err.splitlines()[-1].startswith("moe-train: Invalid value for '--price': ")


def test_tokenizer_train(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "that is the question"}\n{"story": "no text"}\n')
    out = str(tmp_path / "tokenizer")
    assert run("tokenizer", "train", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert 261 < answer["vocab_size"] <= 270
    assert f"{out}/tokenizer.json" in answer["files"] and Path(out, "tokenizer.json").is_file()
    assert run("tokenizer", "train", str(tmp_path / "*"), "--vocab-size", "270", "--out", str(tmp_path / "new")) == 2
    assert capsys.readouterr().err.startswith(f"moe-train: {tmp_path}/b.jsonl:2: no column 'text'; the record has 'story'")


def test_quickstart(stand_in) -> None:
    stand_in("moe_train.commands.quickstart", quickstart=lambda: 75)
    assert run("quickstart") == 75


def test_what_takes_a_while_says_what_it_does(monkeypatch, capsys):
    log = logging.getLogger("moe_train.data.prepared.store")
    monkeypatch.setattr("moe_train.config.schema.json_schema", lambda kind: log.info("tokenising %s", "a.jsonl") or {})
    with pytest.raises(SystemExit):
        main.main(["schema"])
    shown = capsys.readouterr()
    assert shown.err == "tokenising a.jsonl\n" and json.loads(shown.out) == {}
    log.info("after the command, the library is quiet again")
    assert capsys.readouterr().err == ""
