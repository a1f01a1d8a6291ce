"""Text files: one record, or several of bounded size that are cut where a reader would cut."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.records import plain_text
from tests.data.records.sources import opened, texts, wheres


@pytest.mark.parametrize(
    ("unit", "border"),
    [("Grüße.\n\nfrom\n", "\n\n"), ("one line\n", "\n"), ("words ", " "), ("東", ""), ("ab", "")],
)
def test_a_long_text_file_becomes_several_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, border: str) -> None:
    monkeypatch.setattr(plain_text, "MAX_TEXT", 1000)
    text = unit * 1200
    for name, content in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + text.encode()))):
        (tmp_path / name).write_bytes(content)
        found = list(plain_text.read_text(tmp_path / name))
        pieces = [piece for _, piece in found if isinstance(piece, str)]
        assert "".join(pieces) == text and len(pieces) == len(found) > 2
        assert all(len(piece.encode()) <= 1000 for piece in pieces) and all(piece.endswith(border) for piece in pieces[:-1])
        assert [line for line, _ in found] == [1 + "".join(pieces[:i]).count("\n") for i in range(len(pieces))]
    (tmp_path / "b.txt").write_bytes(b"x\n" * 450 + b"y" * 99 + b"\n" + b"x\n" * 200 + b"\xff" + b"z" * 900)
    found = list(plain_text.read_text(tmp_path / "b.txt"))
    assert [(line, str(item)[:40]) for line, item in found if not isinstance(item, str)] == [
        (652, "not UTF-8 (invalid start byte, byte 0xff")
    ]
    assert " at 1400)" in str(next(item for _, item in found if not isinstance(item, str)))


@pytest.mark.usefixtures("no_network")
def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line 1\n\nline 3\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    records = opened(tmp_path / "a.txt", tmp_path / "b.txt.gz")
    assert texts(records) == ["line 1\n\nline 3\n", "packed"]
    assert wheres(records) == [f"{tmp_path / 'a.txt'}:1", f"{tmp_path / 'b.txt.gz'}:1"]
    assert texts(opened(tmp_path / "a.txt", record=config.TextRecord(name="text", column="text"), format="text")) == [
        "line 1\n\nline 3\n"
    ]
