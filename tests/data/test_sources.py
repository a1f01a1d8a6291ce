"""Sources: every format, every origin, and an error that says where."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train import config
from moe_train.data.sources import Records, open_source
from moe_train.data.sources import texts as text_of

ROWS = [{"text": "one"}, {"text": "zwei, ü"}, {"text": "三"}]
TEXT = config.TextRecord(name="text")


def opened(*files: str | Path, **settings: object) -> Records:
    section = {"name": "files", "files": tuple(map(str, files)), "record": TEXT} | settings
    return open_source(config.FileSource.model_validate(section))


def texts(records: Records) -> list[str]:
    return [record["text"] for _, record in records]


def wheres(records: Records) -> list[str]:
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
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "array.json").write_text("\n " + json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "odd [1]*").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "odd [1]*" / "table.parquet")
    with pa.OSFile(str(tmp_path / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("lines.jsonl", "zipped.jsonl.gz", "array.json", "odd [1]*/table.parquet", "table.arrow", "saved"):
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
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "empty").mkdir()
    for missing in ("nothing.jsonl", "*.parquet", "empty"):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            opened(tmp_path / missing)
    with pytest.raises(ValueError, match=r"a\.csv: no format goes with its name .*state format"):
        opened(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="named twice"):
        opened(tmp_path / "a.txt", tmp_path / "*.txt")
    with pytest.raises(ValueError, match="plain text, which has no chat records"):
        opened(tmp_path / "a.txt", record=config.ChatRecord(name="chat"))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: a record should be an object \{…\}, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 .*0xff"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.json", b'[{"text": "a"},\n3]', r"a\.json: row 2: a record should be an object"),
        ("a.json", b'[{"text": "a"},\n\n', r"a\.json:3: not JSON"),
        ("a.txt", b"a\nb\n\xff", r"a\.txt:3: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], r"a\.jsonl\.gz: cannot be read to its end"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be read to its end"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as parquet"),
        ("a.arrow", b"ARROW1", r"a\.arrow: cannot be read as arrow"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))


def test_the_identity_is_the_content_not_the_path(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    first, same, other = write_lines("a.jsonl", ROWS), write_lines("b.jsonl", ROWS), write_lines("c.jsonl", ROWS[:2])
    assert opened(first).identity == opened(same).identity != opened(other).identity
    assert opened(first, other).identity != opened(other, first).identity
    os.utime(first)
    assert opened(first).identity == opened(same).identity


def hub(**settings: object) -> Records:
    section = {"name": "hub", "dataset": "nobody/nothing", "revision": "0" * 40, "record": TEXT} | settings
    return open_source(config.HubSource.model_validate(section))


def test_the_hub_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hub:nobody/nothing@0000.* cannot be had .*use files") as caught:
        list(hub())
    assert "\n" not in str(caught.value)


def test_the_hub_needs_a_commit() -> None:
    with pytest.raises(ValueError, match="revision main of nobody/nothing can move"):
        hub(revision="main")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object, **settings: object) -> datasets.Dataset:
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([row | {"other": 1} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = hub(subset="en", split="test")
    assert list(records) == [((0, i + 1), row) for i, row in enumerate(ROWS)]
    assert asked == [(("nobody/nothing", "en"), {"split": "test", "revision": "0" * 40})]
    assert wheres(records)[2] == f"hub:nobody/nothing@{'0' * 40}/en/test: row 3"
    assert records.identity != hub(split="test").identity


def test_the_texts_of_a_source(write_lines: Callable[..., Path]) -> None:
    section = config.FileSource(name="files", files=(str(write_lines("a.jsonl", [*ROWS, {"text": 1}])),), record=TEXT)
    found = text_of(section)
    assert [next(found) for _ in ROWS] == [row["text"] for row in ROWS]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: column 'text' should be text, not 1"):
        next(found)
    with pytest.raises(ValueError, match="not chat records"):
        next(text_of(section.model_copy(update={"record": config.ChatRecord(name="chat")})))
