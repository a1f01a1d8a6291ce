"""The kind of a record, by its columns."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.records.recognise import recognise
from tests.data.records.reading import ANSWER, USER, problem

MESSAGES = [USER, ANSWER]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"content": "a", "messages": None}, "text"),
        ({"conversations": MESSAGES, "id": 1}, "chat"),
        ({"messages": MESSAGES, "prompt": "a", "completion": "b"}, "chat"),
        ({"text": "a", "instruction": "b", "output": "c"}, "completion"),
        ({"input": "a", "output": "b"}, "completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "labelled"),
        ({"text": "a", "label": False}, "text"),
        ({"prompt": "a", "completion": "b", "label": "spam"}, "completion"),
    ],
)
def test_kinds(fields: dict[str, Any], kind: str) -> None:
    assert recognise(fields).name == kind


def test_all_columns_of_messages_are_one_kind() -> None:
    assert recognise({"messages": MESSAGES}) == recognise({"conversations": MESSAGES}) == recognise({"interactions": MESSAGES})


def test_what_is_ignored_is_not_there() -> None:
    fields = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    assert recognise(fields).name == "preference" and recognise(fields, ("chosen", "rejected")).name == "completion"
    assert recognise(fields, ("chosen",)).ignore == ("chosen",)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "completion": "b", "question": "c"},
        {"question": "a", "answer": "b", "response": "c"},
        {"prompt": "a", "question": "b", "answer": "c"},
        {"input": "a", "output": "b", "prompt": "c"},
        {"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"},
    ],
)
def test_two_columns_of_one_meaning_are_a_choice(fields: dict[str, Any]) -> None:
    refused = problem(fields)
    name = refused.remedy.rpartition(" ")[2]
    assert refused.rule == "columns" and "which differ" in refused.message
    recognise(fields, (name,))
    recognise(fields | {name: ""})
    recognise({**dict.fromkeys(fields, "a"), name: "a"})


@pytest.mark.parametrize("fields", [USER, {"from": "human", "value": "a"}, {"role": "user", "content": "a", "id": 1}])
def test_a_message_is_no_record(fields: dict[str, Any]) -> None:
    assert "not a conversation" in problem(fields).message


@pytest.mark.parametrize(
    ("fields", "empty"),
    [
        ({"text": None}, "'text'"),
        ({"messages": None, "id": 1}, "'messages'"),
        ({"prompt": None, "completion": "b"}, "'prompt'"),
        ({"prompt": None, "completion": None}, "'prompt' and 'completion'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected'"),
    ],
)
def test_an_empty_column_is_named(fields: dict[str, Any], empty: str) -> None:
    refused = problem(fields)
    assert refused.message == f"column {empty} is null or empty" and "--map" not in refused.remedy


def test_a_record_of_no_kind_names_its_columns() -> None:
    refused = problem({"prompt": "a", "chosen": "b"})
    assert refused.rule == "columns" and "prompt, chosen" in refused.message and "--map" in refused.remedy
