"""Files to check: those that a config names, columns by a mapping, and how records are located in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from moe_train import config
from moe_train.data.check.sources import CheckedFile, section_of, sources_of
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import Write, check_files


def test_columns_by_a_mapping(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"ask": "2 + 3?", "say": "5"}])
    assert check_files(tokenizer, path)["problem_counts"] == {"columns": 1}
    assert check_files(tokenizer, path, record=section_of(["prompt=ask", "completion=say"]))["problems"] == []
    assert section_of(["messages=x"]) == config.ChatRecord(name="chat", column="x")
    assert section_of(["text=x"]) == config.TextRecord(name="text", column="x")
    assert section_of([]) is None
    for wrong in (["prompt=a"], ["text=a", "messages=b"], ["text"], ["body=a"]):
        with pytest.raises(ValueError, match=r"--map .* should be"):
            section_of(wrong)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (config.PreparedSource(name="prepared", path="s3://sets/a"), "s3://sets/a is a prepared source.*manifest.json names"),
        (
            config.HubSource(name="hub", dataset="o/d", revision="0" * 40, record=config.TextRecord(name="text")),
            "o/d is a hub source, and not files of records.*its download",
        ),
    ],
)
def test_what_is_not_in_files_is_refused(source: config.Source, message: str) -> None:
    with pytest.raises(ValueError, match=f"^data: {message}"):
        sources_of([source])


@pytest.mark.parametrize(("counted", "location"), [("line", "a.jsonl:7"), ("row", "a.jsonl: row 7"), ("byte", "a.jsonl: byte 7")])
def test_a_record_is_located_in_the_unit_of_its_file(counted: Literal["line", "row", "byte"], location: str) -> None:
    assert CheckedFile(Path("a.jsonl"), "json", 0, counted).location(7) == location
