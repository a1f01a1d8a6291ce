"""JSON lines: blocks of whole lines from anywhere in a file, and each fault at its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.records import json_lines
from tests.data.records.sources import ROWS, opened, texts, wheres


def test_blocks_hold_whole_lines_and_number_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * (37 * n % 101)}).encode() for n in range(200)]
    path.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(json_lines, "BLOCK", 64)
    found = list(json_lines.blocks(path))
    assert b"".join(block.lines for block in found if isinstance(block.lines, bytes)) == path.read_bytes()
    assert [number for number, _ in json_lines.read_lines(path)] == list(range(1, 201))
    at = len(b"\n".join(lines[:50])) + 1
    stop = len(b"\n".join(lines[:70])) + 1
    assert [number for number, _ in json_lines.read_lines(path, at, stop, 51)] == list(range(51, 71))
    assert [number for number, _ in json_lines.read_lines(path, at, stop + 3, 51)] == list(range(51, 72))


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 5000 + '"}\n{"text": "c"}\n{"text": "' + "d" * 5000)
    monkeypatch.setattr(json_lines, "BLOCK", 64)
    monkeypatch.setattr(json_lines, "MAX_RECORD", 1000)
    found = dict(json_lines.read_lines(path))
    assert found[1] == {"text": "a"} and found[3] == {"text": "c"} and len(found) == 4
    assert all("longer than" in str(found[line]) for line in (2, 4))


def test_a_line_is_not_blamed_for_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": NaN} x\n{"text": "good"}\n', encoding="utf-8")
    (_, first), (_, second) = json_lines.read_lines(tmp_path / "a.jsonl")
    assert "Extra data at column 15" in str(first) and second == {"text": "good"}


@pytest.mark.usefixtures("no_network")
def test_json_lines_with_blank_ones_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]), "", "  ", json.dumps(ROWS[1], ensure_ascii=False), json.dumps(ROWS[2])]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert texts(opened(path)) == ["one", "zwei, ü", "三"]
    assert wheres(opened(path)) == [f"{path}:1", f"{path}:4", f"{path}:5"]
