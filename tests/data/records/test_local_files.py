"""Local files: every format, and an error that says where."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train import config
from moe_train.data.records.open_source import open_source
from moe_train.data.records.source import OpenSource

ROWS = [{"text": "one"}, {"text": "zwei, ü"}, {"text": "三"}]
TEXT = config.TextRecord(name="text")


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def opened(*files: str | Path, **settings: object) -> OpenSource:
    section = {"name": "files", "files": tuple(map(str, files)), "record": TEXT} | settings
    return open_source(config.FileSource.model_validate(section))


def texts(records: OpenSource) -> list[str]:
    return [record["text"] for _, record in records]


def wheres(records: OpenSource) -> list[str]:
    return [records.where(origin) for origin, _ in records]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files must not cause network traffic."""

    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_json_lines_with_blank_ones_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]), "", "  ", json.dumps(ROWS[1], ensure_ascii=False), json.dumps(ROWS[2])]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert texts(opened(path)) == ["one", "zwei, ü", "三"]
    assert wheres(opened(path)) == [f"{path}:1", f"{path}:4", f"{path}:5"]


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


def test_conversations_from_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(pa.table({"messages": [messages]}), tmp_path / "chat.parquet")
    [(_, record)] = opened(tmp_path / "chat.parquet", record=config.ChatRecord(name="chat"))
    assert record == {"messages": messages}


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line 1\n\nline 3\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    records = opened(tmp_path / "a.txt", tmp_path / "b.txt.gz")
    assert texts(records) == ["line 1\n\nline 3\n", "packed"]
    assert wheres(records) == [f"{tmp_path / 'a.txt'}:1", f"{tmp_path / 'b.txt.gz'}:1"]
    assert texts(opened(tmp_path / "a.txt", record=config.TextRecord(name="text", column="text"), format="text")) == [
        "line 1\n\nline 3\n"
    ]


def test_folders_and_globs_come_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.md", ".hidden.txt", ".git/x.txt", "b/picture.png", "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(opened(tmp_path)) == ["a.md", "b/10.txt", "b/2.txt"]
    assert texts(opened(tmp_path / "*" / "*.txt")) == ["b/10.txt", "b/2.txt"]
    assert texts(opened(tmp_path / "c.py", format="text")) == ["c.py"]


def test_files_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.xls").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^data: s3://bucket/\*.jsonl is a URL; records are read from this machine's"):
        opened("s3://bucket/*.jsonl")
    for missing in ("nothing.jsonl", "*.parquet", "empty"):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            opened(tmp_path / missing)
    with pytest.raises(ValueError, match=r"a\.xls: no format goes with its name .*state format"):
        opened(tmp_path / "a.xls")
    (tmp_path / "a.parquet.gz").write_text("a")
    with pytest.raises(ValueError, match="parquet is compressed inside"):
        opened(tmp_path / "a.parquet.gz")
    with pytest.raises(ValueError, match="named twice"):
        opened(tmp_path / "a.txt", tmp_path / "*.txt")
    with pytest.raises(ValueError, match="plain text, which has no chat records"):
        opened(tmp_path / "a.txt", record=config.ChatRecord(name="chat"))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: a record should be an object \{…\}, not a list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 .*0xff"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: row 1: not JSON"),
        ("a.json", b'[{"text": "a"},\n3]', r"a\.json: row 2: a record should be an object"),
        ("a.json", b'[{"text": "a"},\n\n', r"a\.json: row 2: not JSON: the array ends on line 3"),
        ("a.json", b'[{"text": "a"},\n\n{"text" 3}]', r"a\.json: row 2: not JSON: .* on line 3"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r"a\.json: row 2: not JSON: no , before .* on line 2"),
        ("a.json", b'[{"text": "a"}] []', r"a\.json: row 2: not JSON: something follows the array"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: not JSON: the key 'text' stands twice"),
        ("a.jsonl", b'{"text": "a", "score": NaN}', r"a\.jsonl:1: not JSON: NaN is no JSON number"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not JSON that can be used: .*digits"),
        ("a.jsonl", b'{"a": ' * 200 + b"1" + b"}" * 200, r"a\.jsonl:1: .*nested deeper than 100"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 \(it looks like UTF-16\)"),
        ("a.jsonl", '{"text": 1\n'.encode("utf-16-le"), r"a\.jsonl:1: not UTF-8 \(it looks like UTF-16\)"),
        ("a.jsonl", b'{"text": "a', r"a\.jsonl:1: not JSON: Unterminated string starting at column 10"),
        ("a.jsonl", b'{"text": "a"}\n\0\0\0\n', r"a\.jsonl:2: not JSON: a NUL"),
        ("a.txt", b"a\nb\n\xff", r"a\.txt:3: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], r"a\.jsonl\.gz:\d+: cannot be unpacked to its end"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 1000)[:-20], r"a\.jsonl\.bz2:\d+: cannot be unpacked to its end"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 1000)[:-20], r"a\.jsonl\.xz:\d+: cannot be unpacked to its end"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 1000)[:-2], r"a\.jsonl\.zst:\d+: cannot be unpacked to its end"),
        ("a.csv", b"text,n\na,1\nb\n", r"a\.csv: row 2: line 3 has 1 values for 2 columns"),
        ("a.csv", b"text,text\na,1\n", r"a\.csv: row 0: the header names a column twice"),
        ("a.csv", b'text\na\n"b"c\n', r"a\.csv: row 2: line 3 is no CSV"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv: row 1: not UTF-8"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz:1: cannot be unpacked to its end"),
        ("a.parquet", b"PAR1", r"a\.parquet: row 1: cannot be read as parquet"),
        ("a.arrow", b"ARROW1", r"a\.arrow: row 1: cannot be read as arrow"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))
