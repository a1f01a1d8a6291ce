"""A JSON array: the same records however it is cut, and each fault at its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.records import json_array
from tests.data.records.sources import opened, texts


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": "ü" * (n % 7), "n": [n, {"m": -n / 3}]} for n in range(100)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
        for size in (1, 2, 3, 7, 64, 1000):
            monkeypatch.setattr(json_array, "BLOCK", size)
            assert list(json_array.read_array(path)) == list(enumerate(values, start=1))
    path.write_text("[ ]")
    assert list(json_array.read_array(path)) == []
    path.write_text("[1]")
    assert [str(item) for _, item in json_array.read_array(path)] == [
        "a record should be an object {…}, not a number; write one object for each record"
    ]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_fault_is_at_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_array, "BLOCK", size)
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"b":\n 2, "c" 3},\n{"d": 4},\n{"e": 5}]')
    *_, (number, fault) = json_array.read_array(path)
    assert number == 2 and "on line 4;" in str(fault)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.json", b'[{"text": "a"},\n3]', r"a\.json: row 2: a record should be an object"),
        ("a.json", b'[{"text": "a"},\n\n', r"a\.json: row 2: not JSON: the array ends on line 3"),
        ("a.json", b'[{"text": "a"},\n\n{"text" 3}]', r"a\.json: row 2: not JSON: .* on line 3"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r"a\.json: row 2: not JSON: no , before .* on line 2"),
        ("a.json", b'[{"text": "a"}] []', r"a\.json: row 2: not JSON: something follows the array"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))
