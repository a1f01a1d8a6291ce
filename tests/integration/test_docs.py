"""The documentation: generated pages are current, links lead somewhere, and its commands, keys and programs work.

Shell blocks are parsed by the real command line, YAML blocks are looked up in the schemas, and Python blocks are executed, unless
their fence says `notest`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from moe_train.cli import main
from moe_train.config import Config, Suite
from moe_train.config.key_reference import keys
from moe_train.config.strict_yaml import parse_yaml
from moe_train.config.yaml_file import flat

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
APP: Any = typer.main.get_command(main.app)
KNOWN = {re.sub(r"\[\]", "", entry.path) for kind in (Config, Suite) for entry in keys(kind)}


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w[\w ]*)\n(.*?)^```$", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            if match[1] in languages:
                found.append(Block(f"{page.relative_to(ROOT)}:{line}", match[1], match[2]))
    return found


def test_the_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for file, text in generate.pages().items():
        assert file.read_text(encoding="utf-8") == text, f"{file} is out of date; run: .venv/bin/python docs/generate.py"


def words_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a shell line, without comments, redirections and settings of the environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;>"):
            if command:
                yield command
            command = []
        elif command or not re.match(r"[A-Z_]+=", word):
            command.append(word)


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for block in blocks("bash", "console"):
        lines = block.text.replace("\\\n", " ").splitlines()
        for number, line in enumerate(lines, 1):
            if block.language == "console" and not line.startswith("$ "):
                continue
            for words in words_of(line.removeprefix("$ ")):
                found.append((f"{block.where}+{number}", words))
    return found


def test_commands_of_the_pages_are_accepted() -> None:
    """Every `moe-train …` parses, and every script that a page starts exists."""
    parsed = 0
    for where, words in commands():
        program, *arguments = words
        if program == "bash" and arguments[0].startswith("launch/"):
            assert (ROOT / arguments[0]).is_file(), f"{where}: {arguments[0]} does not exist"
        if Path(program).name == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), f"{where}: {arguments[0]} does not exist"
        if Path(program).name != "moe-train" or arguments[0].startswith("--"):
            continue
        try:
            context = APP.make_context("moe-train", list(arguments))
            name, command, rest = APP.resolve_command(context, list(arguments))
            while hasattr(command, "commands"):
                name, command, rest = command.resolve_command(context, rest)
            command.make_context(name, rest)
        except main._UsageError as error:
            pytest.fail(f"{where}: {shlex.join(words)}: {error.format_message()}")
        for word in arguments:
            assert not word.startswith(("configs/", "tests/")) or (ROOT / word).exists(), f"{where}: {word} does not exist"
        parsed += 1
    assert parsed > 50


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.where)
def test_keys_of_yaml_blocks_exist(block: Block) -> None:
    tree, _ = parse_yaml(block.text, block.where)
    assert isinstance(tree, dict)
    for path in flat(tree):
        plain = re.sub(r"\.\d+", "", path)
        if plain.rpartition(".")[2] != "name":
            # A value that is a mapping of its own, such as the roles of a chat, ends at its key.
            assert any(plain == key or plain.startswith(f"{key}.") for key in KNOWN), f"{block.where}: there is no key {plain}"
    if "run_dir" in tree:
        Config.model_validate_json(json.dumps(tree))


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.where)
def test_json_blocks_are_records(block: Block) -> None:
    for line in block.text.splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.where)
def test_python_blocks_run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})


def test_blocks_name_their_language() -> None:
    """No block is left out by a misspelled fence."""
    known = {"bash", "console", "yaml", "json", "python", "python notest", "text"}
    for page in PAGES:
        fences = re.findall(r"^```([^\n`]*)$", page.read_text(encoding="utf-8"), re.M)
        # Every second one ends a block; `{…}` is a directive of the site.
        languages = {fence for fence in fences[::2] if not fence.startswith("{")}
        assert languages <= known, f"{page}: {sorted(languages - known)}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target} does not exist"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    entries = {line.strip() for line in index.splitlines()}
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs").with_suffix(""))
        assert name == "index" or name in entries, f"docs/index.md does not list {name}"


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """The site of all pages and notebooks builds, without a network; needs the extra `docs`."""
    build = pytest.importorskip("sphinx.cmd.build")
    assert build.main(["-q", "-W", str(ROOT / "docs"), str(tmp_path)]) == 0
    assert "moe_train" in (tmp_path / "index.html").read_text(encoding="utf-8")
