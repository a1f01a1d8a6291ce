"""Records as a program reads them: with the location of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.records.load_records import load_records


def test_records_come_with_their_locations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three")
    records = list(
        load_records(f"{tmp_path}/*.jsonl", str(tmp_path / "b.txt"), record=config.TextRecord(name="text", column="body"))
    )
    assert records == [
        (f"{tmp_path}/a.jsonl:1", {"messages": []}),
        (f"{tmp_path}/a.jsonl:3", {"text": "two"}),
        (f"{tmp_path}/b.txt:1", {"body": "three"}),
    ]


def test_a_malformed_record_is_an_error_with_its_location(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    records = load_records(str(tmp_path / "a.jsonl"))
    assert next(records)[1] == {"text": "one"}
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        next(records)
