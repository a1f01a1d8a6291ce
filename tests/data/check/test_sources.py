"""Files to check: those that a config names, columns by a mapping, and how records are located in messages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from moe_train import config
from moe_train.data.check.report import print_report
from moe_train.data.check.sources import CheckedFile, section_of, sources_of
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.check.samples import CHAT, Write, check_files


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


def test_an_archive_that_cannot_be_read_is_a_problem_and_the_other_files_are_checked(
    v3: Mistral, tmp_path: Path, write_lines: Write
) -> None:
    write_lines("a.jsonl", [CHAT])
    write_lines("c.jsonl", [CHAT | {"id": 1}])
    (tmp_path / "b.zip").write_bytes(b"no archive")
    (tmp_path / "notes.pdf").write_bytes(b"")
    answer = check_files(v3, tmp_path, fix=tmp_path / "fixed")
    (problem,) = answer["problems"]
    assert problem["where"].startswith(f"{tmp_path}/b.zip") and "cannot be read as a zip archive" in problem["message"]
    assert answer["records"] == 3 and answer["left_out"] == {".pdf": 1}
    assert sorted(file.name for file in (tmp_path / "fixed").iterdir()) == ["a.jsonl", "c.jsonl", "changes.log"]
    shown = io.StringIO()
    print_report(answer, Console(file=shown, width=200))
    assert "files not read" in shown.getvalue() and ".pdf (1 file)" in shown.getvalue()


@pytest.mark.parametrize(("counted", "location"), [("line", "a.jsonl:7"), ("row", "a.jsonl: row 7"), ("byte", "a.jsonl: byte 7")])
def test_a_record_is_located_in_the_unit_of_its_file(counted: Literal["line", "row", "byte"], location: str) -> None:
    assert CheckedFile(Path("a.jsonl"), "json", 0, counted).location(7) == location
