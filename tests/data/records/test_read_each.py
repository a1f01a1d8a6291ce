"""Every record of a file, or the line of the first that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.data.records.problem import Problem
from moe_train.data.records.read_each import read_each, refuse_unread
from moe_train.data.records.unread import Unread


def read(remaining: dict[str, Any], location: str) -> tuple[Any, str]:
    value = remaining.pop("text")
    if not value:
        raise Problem("empty", "the text is empty", "write it")
    refuse_unread(remaining, Unread(), "a record has text")
    return value, location


def test_records_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "label": null}\n\n{"text": "b"}\n')
    assert read_each(file, "text", "text", read) == [("a", f"{file}:1"), ("b", f"{file}:3")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl has no texts; write one JSON object with messages or text per line"),
        ('{"text": "a"}\n{', r"a.jsonl:2: "),
        ('{"text": ""}', "a.jsonl:1: the text is empty; write it"),
        ('{"text": "a", "label": 1}', "a.jsonl:1: key 'label' is not read; remove it; a record has text"),
    ],
)
def test_what_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_each(tmp_path / "a.jsonl", "text", "text", read)
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl: no such file of texts"):
        read_each(tmp_path / "b.jsonl", "text", "text", read)
