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


def test_a_record_of_no_kind_names_its_columns() -> None:
    refused = problem({"prompt": "a", "chosen": "b"})
    assert refused.rule == "columns" and "prompt, chosen" in refused.message and "--map" in refused.remedy
