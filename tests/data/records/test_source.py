"""A source: records in order with where each stands, an error at the first that is malformed, and the protocol of records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.data.records.problem import Item, Problem
from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource, Place, Records, Span


class Listed(OpenSource):
    """Two places that hold lists of items."""

    places = (Place("a.jsonl", "json", True), Place("b.parquet", "parquet", False))

    def __init__(self, *items: list[Item]) -> None:
        self._items = items

    def scan(self, memory: Path) -> list[Scan]:
        return [Scan(None) for _ in self.places]

    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        return enumerate(self._items[span.place], start=1)


def test_records_come_place_by_place_with_where_they_stand() -> None:
    source = Listed([{"n": 1}, {"n": 2}], [{"n": 3}])
    assert list(source) == list(source) == [((0, 1), {"n": 1}), ((0, 2), {"n": 2}), ((1, 1), {"n": 3})]
    assert [source.where(origin) for origin, _ in source] == ["a.jsonl:1", "a.jsonl:2", "b.parquet: row 1"]
    assert source.names == ("a.jsonl", "b.parquet")


def test_the_first_malformed_record_is_named() -> None:
    with pytest.raises(ValueError, match=r"^a\.jsonl:2: not JSON; correct it$"):
        list(Listed([{"n": 1}, Problem("not-json", "not JSON", "correct it")], []))


def test_a_list_lacks_what_records_need() -> None:
    class Own(list):
        identity = "1"

        def where(self, index: int) -> str:
            return f"row {index}"

    assert isinstance(Own(), Records) and not isinstance([], Records)
