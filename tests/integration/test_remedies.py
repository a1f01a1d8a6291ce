"""Commands that messages print exist, with the options that they name; those that can run here are run, and help.

Every text of the package is searched for `moe-train …`, so that a renamed command or option cannot stay behind in a message.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from moe_train.cli import main
from tests.cli.command import run

ROOT = Path(__file__).parents[2]
APP: Any = typer.main.get_command(main.app)
# A command in a text ends with the sentence, or where the text goes on in words.
_MENTION = re.compile(r"(?<![\w/.-])moe-train ([a-z][a-z-]*)((?: [^\s;,`'\")]+)*)")
_GLOBAL = {"--debug", "--no-compile-cache", "--help", "--version", "--install-completion"}


def texts() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string of the package, with X for what is filled in."""
    for file in sorted((ROOT / "moe_train").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values]
                yield f"{file.relative_to(ROOT)}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value


def fault_of(first: str, rest: str) -> str | None:
    """What is wrong with a mention of a command; None if nothing is."""
    words = [word for word in rest.split() if word != "…"]
    command = APP.commands.get(first)
    name = first
    if command is not None and hasattr(command, "commands"):
        name = f"{first} {words[0]}" if words else first
        command = command.commands.get(words[0]) if words else command
    if command is None:
        return f"there is no command {name}"
    known = _GLOBAL | {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    stated = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    unknown = sorted(stated - known)
    return f"{name} has no option {unknown[0]}" if unknown else None


def test_every_command_that_a_text_names_exists() -> None:
    prose = {"and", "is", "or", "for", "in", "with", "has", "itself", "of", "the", "needs", "can"}
    mentions = 0
    faults = []
    for where, text in texts():
        for match in _MENTION.finditer(text):
            if match[1] in prose:
                continue
            mentions += 1
            fault = fault_of(match[1], match[2])
            if fault is not None:
                faults.append(f"{where}: {fault}: {match[0]}")
    assert not faults, "\n".join(faults)
    assert mentions > 100


def command_in(message: str) -> list[str]:
    """The arguments of the command that ends a message."""
    (text,) = re.findall(r"(?:moe-train|-m moe_train) ([a-z].*)$", message, re.M)
    return shlex.split(text)


@pytest.mark.parametrize("arguments", [("train", "new/quickstart_lora.yaml"), ("inspect", "new/smollm2_own_data_lora.yaml")])
def test_a_recipe_that_is_missing_is_written_by_the_remedy(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    assert run(*arguments) == 2
    assert run(*command_in(capsys.readouterr().err)) == 0
    assert (tmp_path / arguments[1]).is_file()


def test_evidence_that_was_filled_in_is_sealed_by_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    chain = {"raw_files": [], "run_dir": "", "checkpoint": {"files": {}}, "exports": []}
    (folder / "provenance.json").write_text(json.dumps(chain))
    (folder / "page.md").write_text("provider: TODO\n")
    (folder / "evidence.json").write_text(json.dumps({"files": {}, "todo": {}}))
    assert run("evidence", "--check", folder, "--json") == 1
    (fault, *_) = json.loads(capsys.readouterr().out)["checks"]
    assert run(*command_in(fault["said"])) == 0
    assert run("evidence", "--check", folder) == 0
