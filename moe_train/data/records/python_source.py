"""Records from the calling program: an object that implements `Records`.

A null among arguments or in the schema of a tool is refused. Rows of a table have a null for every member of a struct that a record
lacks, and unlike a file, a Python object does not say whether a null was written or filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.records.problem import Item, Problem, brief
from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource, Origin, Place, Records, Span

_OBJECTS = ("arguments", "parameters", "input_schema", "inputSchema", "input", "args", "response_format", "chat_template_kwargs")
"""Keys of objects that are read whole, nulls included; elsewhere a key with null is left out."""
_PER_PART = 1 << 16  # records in a part; preparing a large source can be interrupted between parts


class PythonRecords(OpenSource):
    """The records object that a config section holds."""

    def __init__(self, source: config.PythonSource) -> None:
        """Open the records of a section. Raises ValueError if the object is missing, or lacks a member of `Records`."""
        records = source.records
        if records is None:
            raise ValueError(
                f"data: the records of {source.title} belong to the program that trained on them; pass them again "
                "(config.PythonSource(records=...)), or train from files"
            )
        # A runtime-checkable protocol tests only that the members exist.
        if not isinstance(records, Records):
            missing = [name for name in ("identity", "__len__", "__getitem__", "where") if not hasattr(records, name)]
            raise ValueError(
                f"data: the records of {source.title} are a {type(records).__name__} without {', '.join(missing)}; "
                "see moe_train.data.records.source.Records"
            )
        self._records = records
        self.places = (Place(source.title, "python", False),)

    def scan(self, memory: Path) -> list[Scan]:
        """Return the identity of the records, and cuts every 65536 records."""
        # From _PER_PART on, since the first part begins at 0 and `cuts` holds the starts of those after it.
        cuts = range(_PER_PART, len(self._records), _PER_PART)
        return [Scan(self._records.identity, cuts=tuple((index, index + 1) for index in cuts))]

    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """Yield the records of a span, counted from 1; a ValueError of the object becomes a Problem."""
        stop = len(self._records) if span.stop is None else span.stop
        for index in range(span.start, stop):
            try:
                record = self._records[index]
            except ValueError as error:
                yield index + 1, Problem("unreadable", " ".join(str(error).split()), "correct the record or leave it out")
                continue
            null = _null_in_object(record) if isinstance(record, Mapping) else None
            if null is not None:
                message = f"{null} is null, which a table may have filled in"
                yield index + 1, Problem("arguments", message, "leave it out, or write the object that it is in as JSON text")
            elif isinstance(record, Mapping):
                yield index + 1, dict(record)
            else:
                message = f"the record should be a mapping of columns, not {brief(record)}"
                yield index + 1, Problem("type", message, "return a dict from __getitem__")

    def where(self, origin: Origin) -> str:
        """Return what the object calls the place of a record."""
        return self._records.where(origin.number - 1)


def _null_in_object(record: Mapping[str, Any]) -> str | None:
    """Return the path of a null in an object that is read whole, such as `messages.1.tool_calls.0.function.arguments.port`."""
    # (path, value, whether the value is such an object or in one)
    remaining: list[tuple[str, Any, bool]] = [("", record, False)]
    while remaining:
        path, value, is_whole = remaining.pop()
        if isinstance(value, Mapping):
            for key, member in value.items():
                if member is None and is_whole:
                    return f"{path}{key}"
                remaining.append((f"{path}{key}.", member, is_whole or key in _OBJECTS))
        elif isinstance(value, list | tuple):
            remaining += [(f"{path}{i}.", element, is_whole) for i, element in enumerate(value)]
    return None
