"""JSON values as the standard has them; what Python would let pass is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.records.json_parser import MAX_DEPTH, Parser
from moe_train.data.records.problem import Problem
from tests.data.records.sources import opened, texts


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: a record should be an object \{…\}, not a list"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: row 1: not JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: not JSON: the key 'text' stands twice"),
        ("a.jsonl", b'{"text": "a", "score": NaN}', r"a\.jsonl:1: not JSON: NaN is no JSON number"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not JSON that can be used: .*digits"),
        ("a.jsonl", b'{"a": ' * 200 + b"1" + b"}" * 200, r"a\.jsonl:1: .*nested deeper than 100"),
        ("a.jsonl", b'{"text": "a', r"a\.jsonl:1: not JSON: Unterminated string starting at column 10"),
        ("a.jsonl", b'{"text": "a"}\n\0\0\0\n', r"a\.jsonl:2: not JSON: a NUL"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))


def test_a_value_is_taken_out_of_a_longer_text() -> None:
    parser = Parser()
    text = '[{"a": 1}, 2]'
    value, end = parser.value(text, 1)
    assert (value, text[end:]) == ({"a": 1}, ", 2]") and parser.checked(value, text) == {"a": 1}


def test_a_fault_does_not_pass_to_the_next_record() -> None:
    parser = Parser()
    assert isinstance(parser.record(b'{"a": NaN}'), Problem)
    assert parser.record(b'{"a": 1} \n') == {"a": 1}


def test_nesting_is_allowed_up_to_its_limit() -> None:
    deepest = b'{"a": ' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert isinstance(Parser().record(deepest), dict)
    assert "nested deeper than 100 levels" in str(Parser().record(b'{"a": ' + deepest + b"}"))
