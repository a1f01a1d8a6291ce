"""Files of records: each format gives the same records, and the name of a file says its format."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train.data.records import files
from tests.data.records.sources import PACKED, ROWS, opened, texts, wheres

pytestmark = pytest.mark.usefixtures("no_network")


def test_every_format_gives_the_same_records(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    table = pa.table({"text": [row["text"] for row in ROWS], "other": [1, 2, 3]})
    lines = write_lines("lines.jsonl", ROWS)
    for suffix, compress in PACKED.items():
        (tmp_path / f"packed.jsonl{suffix}").write_bytes(compress(lines.read_bytes()))
    (tmp_path / "array.json").write_text("\n " + json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "array.json.xz").write_bytes(lzma.compress((tmp_path / "array.json").read_bytes()))
    (tmp_path / "table.csv").write_text('id,text\n1,one\n2,"zwei, ü"\n\n3,三\n', encoding="utf-8")
    (tmp_path / "odd [1]*").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "odd [1]*" / "table.parquet")
    with pa.OSFile(str(tmp_path / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    packed = [f"packed.jsonl{suffix}" for suffix in PACKED]
    for name in (
        *packed,
        "lines.jsonl",
        "array.json",
        "array.json.xz",
        "table.csv",
        "odd [1]*/table.parquet",
        "table.arrow",
        "saved",
    ):
        assert texts(opened(tmp_path / name)) == ["one", "zwei, ü", "三"], name
    assert wheres(opened(tmp_path / "array.json"))[1] == f"{tmp_path / 'array.json'}: row 2"
    assert wheres(opened(tmp_path / "table.arrow"))[2] == f"{tmp_path / 'table.arrow'}: row 3"


@pytest.mark.parametrize(
    ("name", "file_format"),
    [("a.JSONL", "json"), ("a.ndjson.gz", "json"), ("b.md", "text"), ("c.csv", "csv"), ("d.arrow", "arrow")],
)
def test_the_name_says_the_format(name: str, file_format: str) -> None:
    assert files.format_of(Path(name)) == file_format


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.xls", r"a\.xls: no format goes with its name \(\.txt, .*; state it with --format"),
        ("a.parquet.gz", "parquet is compressed inside"),
    ],
)
def test_a_name_without_a_format_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.format_of(Path(name))


@pytest.mark.parametrize(("content", "expected"), [('{"text": "a"}\n', True), (' [{"text": "a"}]', False)])
def test_json_is_lines_or_an_array(tmp_path: Path, content: str, expected: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert files.is_json_lines(path, "json") == expected and not files.is_json_lines(path, "text")
