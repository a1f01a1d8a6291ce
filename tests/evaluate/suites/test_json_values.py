"""Equality of JSON values."""

from __future__ import annotations

import pytest

from moe_train.evaluate.suites.json_values import equal


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        ("1", 1, False),
        (None, None, True),
        (None, False, False),
        ({"a": [1, {"b": None}], "c": "x"}, {"c": "x", "a": [1.0, {"b": None}]}, True),
        ({"a": [1, True]}, {"a": [1, 1]}, False),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
    ],
)
def test_equality(first: object, second: object, expected: bool) -> None:
    assert equal(first, second) is expected and equal(second, first) is expected
