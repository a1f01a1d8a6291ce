"""Tables: CSV, Parquet and Arrow."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train import config
from moe_train.data.records.conversation import read
from moe_train.data.records.problem import Problem
from moe_train.data.records.tables import read_csv, read_rows
from moe_train.data.records.unread import NOT_LOADED
from tests.data.records.sources import opened, texts
from tests.data.records.tables import write_table


@pytest.mark.usefixtures("no_network")
def test_conversations_from_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(pa.table({"messages": [messages]}), tmp_path / "chat.parquet")
    [(_, record)] = opened(tmp_path / "chat.parquet", record=config.ChatRecord(name="chat"))
    assert record == {"messages": messages}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", b"text,n\na,1\nb\n", r"a\.csv: row 2: line 3 has 1 values for 2 columns"),
        ("a.csv", b"text,text\na,1\n", r"a\.csv: row 0: the header names a column twice"),
        (
            "a.csv",
            b"prompt;completion\na;b\n",
            r"a\.csv: row 0: the header is one column, 'prompt;completion', .* separated by ';'",
        ),
        ("a.csv", b"prompt\tcompletion\na\tb\n", r"separated by '\\t'; save .*--format tsv"),
        ("a.csv", b'{"text": "a"}\n', r"a\.csv: row 0: the header is no list of names: .*; state --format json"),
        ("a.csv", b'text\na\n"b"c\n', r"a\.csv: row 2: line 3 is no CSV"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv: row 2: not UTF-8 \(byte 0xff before the end of line 3\)"),
        ("a.csv", "text\na\n".encode("utf-16"), r"a\.csv: row 0: not UTF-8 \(it looks like UTF-16\)"),
        ("a.csv", "text\na\n".encode("utf-16-le"), r"a\.csv: row 0: not UTF-8 \(it looks like UTF-16\)"),
        ("a.parquet", b"PAR1", r"a\.parquet: row 1: cannot be read as parquet"),
        ("a.arrow", b"ARROW1", r"a\.arrow: row 1: cannot be read as arrow"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))


def test_a_malformed_row_does_not_end_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\n"b"c,1\n\xe9,2\nd\n"e\nf",3\ng,4\n')
    rows = list(read_csv(tmp_path / "a.csv"))
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5]
    assert [isinstance(row, Problem) for _, row in rows] == [True, True, True, False, False]
    assert rows[3:] == [(4, {"text": "e\nf", "n": "3"}), (5, {"text": "g", "n": "4"})]


def test_rows_are_counted_from_1_and_have_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "other": [1, 2]}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", "parquet", lambda names: ["text"])) == [
        (1, {"text": "a", "other": NOT_LOADED}),
        (2, {"text": "b", "other": NOT_LOADED}),
    ]
    assert next(read_rows(tmp_path / "a.parquet", "parquet", lambda names: [])) == (1, {"text": "a", "other": 1})


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_change_the_meaning_are_read_and_others_named(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": ["a", "b"], "label": [None, 1], "embedding": [[0.5], [1.5]]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    section = config.TextRecord(name="text")
    [(_, first), (_, second)] = opened(path, record=section)
    assert read(first, section).unread == ("embedding",)
    with pytest.raises(Problem, match="has the key 'label'"):
        read(second, section)


def test_values_of_csv_are_text_and_empty_ones_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"a, ""b""",1\n\nc,\n')
    assert list(read_csv(tmp_path / "a.csv")) == [(1, {"text": 'a, "b"', "n": "1"}), (2, {"text": "c", "n": None})]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_null_says_nothing_under_any_spelling_of_a_key_that_changes_the_meaning(tmp_path: Path, kind: str) -> None:
    table = pa.table(
        {"text": ["a", "b"], "imagePath": [None, "b.png"], "no_loss": pa.nulls(2, pa.bool_()), "embedding": [[0.5], [1.5]]}
    )
    (_, first), (_, second) = opened(write_table(table, tmp_path / f"a.{kind}"))
    section = config.TextRecord(name="text")
    assert read(first, section) == ("a", ("embedding",))
    with pytest.raises(Problem, match="'imagePath'"):
        read(second, section)
