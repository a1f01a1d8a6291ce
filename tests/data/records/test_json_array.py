"""JSON values of a stream: the same however it is cut."""

from __future__ import annotations

import io
import json

import pytest

from moe_train.data.records import json_array
from moe_train.data.records.json_array import Window, elements
from moe_train.data.records.json_parser import Parser
from moe_train.data.records.problem import Problem


def read(text: str) -> list[object]:
    return list(elements(Window(io.BytesIO(text.encode())), Parser()))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, size: int, indent: int | None) -> None:
    values = [{"text": "ü" * (n % 7), "n": [n, {"m": -n / 3}]} for n in range(100)]
    monkeypatch.setattr(json_array, "BLOCK", size)
    assert read(json.dumps(values, indent=indent, ensure_ascii=False)) == values


def test_an_empty_array_and_one_of_a_number() -> None:
    assert read("[ ]") == []
    [item] = read("[1]")
    assert str(item) == "a record should be an object {…}, not a number; write one object for each record"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[{"a": 1},\n\n', "the text ends on line 3"),
        ('[{"a": 1},\n\n{"b" 3}]', "on line 3"),
        ('[{"a": 1}\n{"b": 1}]', "no , before .* on line 2"),
    ],
)
def test_a_fault_is_at_its_own_line(text: str, fault: str) -> None:
    with pytest.raises(Problem, match=fault):
        read(text)
