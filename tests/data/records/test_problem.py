"""One thing that is wrong with a record: what it says, and how a caller adds the place."""

from __future__ import annotations

import pickle

import pytest

from moe_train.data.records.problem import Problem, brief, checked_text, located, text_field


def test_a_problem_says_what_and_the_remedy_in_another_process_too() -> None:
    problem = Problem("type", "it is a number", "write it as a string")
    again = pickle.loads(pickle.dumps(problem))
    assert str(again) == str(problem) == "it is a number; write it as a string"
    assert (again.rule, again.message, again.remedy) == ("type", "it is a number", "write it as a string")


def test_the_place_stands_before_an_error() -> None:
    assert located("a.jsonl:3", int, "4") == 4
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: invalid literal"):
        located("a.jsonl:3", int, "four")


@pytest.mark.parametrize(
    ("fields", "rule", "message"),
    [
        ({"body": "a", "id": 1}, "columns", "no column 'text'; the record has 'body', 'id'; name it with --map"),
        ({}, "columns", "no column 'text'; the record has none"),
        ({"text": 3}, "type", "column 'text' should be text, not 3; write it as a string"),
        ({"text": "ü\ud800"}, "unicode", "column 'text' has half a surrogate pair at character 1; remove it"),
    ],
)
def test_a_column_without_text(fields: dict[str, object], rule: str, message: str) -> None:
    with pytest.raises(Problem) as caught:
        text_field(fields, "text")
    assert caught.value.rule == rule and str(caught.value).startswith(message)


def test_text_passes_as_it_is() -> None:
    assert text_field({"text": "a\n"}, "text") == "a\n" and checked_text("東京", "the answer") == "東京"


def test_a_long_value_is_cut() -> None:
    assert brief("x" * 58) == repr("x" * 58) and brief("x" * 59) == "'" + "x" * 56 + "..."
