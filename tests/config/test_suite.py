"""Suites: what their YAML file may state."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config import Suite
from moe_train.config.strict_yaml import ConfigError
from moe_train.config.yaml_file import load_section

SMALL = "name: kpi\nitems: items.jsonl\ngrader: {name: exact}\n"


def load(tmp_path: Path, text: str) -> Suite:
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    return load_section(file, Suite)


def test_defaults(tmp_path: Path) -> None:
    suite = load(tmp_path, SMALL)
    assert suite.prompt.chat and suite.generation.temperature == 0 and suite.limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "generation: {max_token: 3}\n", "suite.yaml:4: generation.max_token: unknown key; did you mean max_tokens?"),
        (SMALL + "prompt: {template: 'Answer:'}\n", "has no {question}, so every item would be the same"),
        (SMALL + "prompt: {chat: false, system: Be brief.}\n", "system is a turn of a chat, and chat is false"),
        (SMALL + "prompt: {separator: x}\n", "separator has no effect in a chat"),
        (SMALL.replace("exact", "choice") + "generation: {max_tokens: 3}\n", "generation has no effect with the grader choice"),
        (SMALL.replace("exact", "choice, compare: letters"), "write {choices} into prompt.template"),
        (SMALL + "category_of_file: '(.+)'\ncolumns: {category: c}\n", "both name the category"),
        (SMALL.replace("exact", "exakt"), "suite.yaml:3: grader.name: one of exact, "),
        (SMALL.replace("exact", "regex, pattern: '('"), "is no regular expression"),
        (SMALL.replace("exact", "regex"), "grader.pattern: required, and missing"),
        (SMALL.replace("kpi", "'k p'"), "suite.yaml:1: name: "),
    ],
)
def test_what_is_not_valid(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
