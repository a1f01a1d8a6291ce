"""Pairs side by side, and answers with their labels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_train import config
from moe_train.commands.show import record_of
from moe_train.commands.show_pairs import ShownPair, pairs_of, print_pairs

PAIR = {"prompt": "Name a fruit.", "chosen": "Cherry.\x1b[31m", "rejected": "Stone."}


def shown(path: Path, *records: object) -> list[ShownPair]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = record_of([str(path)], "auto")
    return pairs_of(config.FileSource(name="files", files=(str(path),), record=section), 5)


def test_a_pair_has_its_answers_side_by_side(tmp_path: Path) -> None:
    pairs = shown(tmp_path / "a.jsonl", PAIR)
    console = Console(file=io.StringIO(), width=300, force_terminal=False, color_system=None)
    print_pairs(pairs, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if "Cherry" in line]
    assert "Stone." in line and "\x1b[31m" not in text and "user: Name a fruit." in text and "a.jsonl:1" in text
    assert pairs[0].as_json()["rejected"] == [{"role": "assistant", "content": "Stone."}]


def test_a_labelled_answer_says_whether_it_is_good(tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    assert [list(pair.answers) for pair in shown(tmp_path / "a.jsonl", *records)] == [["good"], ["bad"]]


def test_a_record_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the record is of the kind text"):
        shown(tmp_path / "a.jsonl", PAIR, {"text": "a"})
