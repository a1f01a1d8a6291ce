"""Strict YAML: what is refused, and that values are read back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.strict_yaml import dotted, format_yaml, parse_yaml, shown
from tests.config.tiny import faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: a config consists of sections with `key: value` (value null)"),
        ("- a\n", ':1: a config consists of sections with `key: value` (value ["a"])'),
        ("name: a\nname: b\n", ":2: name: stated twice, first on line 1"),
        ("train:\n  steps: 1\n  steps: 1\n", ":3: train.steps: stated twice, first on line 2"),
        ("1: a\n", ":1: a key must be a string (value 1)"),
        ("? [a]\n: b\n", ":1: a key must be a string (value a list or section)"),
        ("a: &x 1\nb: *x\n", ":1: not valid YAML: anchors and aliases are not supported; write the value out"),
        ("b: *x\n", ":1: not valid YAML: anchors and aliases are not supported; write the value out"),
        ("a: 1\nb: !!python/name:os.system x\n", ":2: b: tags (tag:yaml.org,2002:python/name:os.system) are not supported"),
        ("a: {b: !include other.yaml}\n", ":1: a.b: tags (!include) are not supported"),
        ("a: .nan\n", ':1: a: a number must be finite (value ".nan")'),
        ("a: 1e999\n", ':1: a: a number must be finite (value "1e999")'),
        ("a: " + "9" * 5000, ":1: a: the number is too large"),
        ("a: [1\nb: 2\n", ":2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 1\n", ":2: not valid YAML: but found another document"),
        ("a:\n\t- 1\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: \x00\n", ":1: not valid YAML: "),
        ("[" * 20_000, ":1: not valid YAML: "),
    ],
)
def test_yaml_that_is_refused(run: Path, text: str, said: str) -> None:
    (line,) = faults(run, text=text)
    assert line.startswith(f"run.yaml{said}")


def test_scalars_are_those_of_yaml_1_2_and_have_lines() -> None:
    values, lines = parse_yaml("a: [1e-4, 0x1f, 0o7]\nb: {c: no, d: ~}\n", "here")
    assert values == {"a": [1e-4, 31, 7], "b": {"c": "no", "d": None}}
    assert (lines["a", 2], lines["b",], lines["b", "d"]) == (1, 2, 2)


def test_what_is_written_is_read_back() -> None:
    tree = {"yes": ["no", "1:30", "", "0o7", None, 1e-8], "text": "a: b # c"}
    assert parse_yaml(format_yaml(tree), "here")[0] == tree


def test_messages_quote_a_value_and_its_key() -> None:
    assert shown("x" * 80) == '"' + "x" * 58 + "…"
    assert (dotted(("data", "train", 0)), dotted(())) == ("data.train.0: ", "")
