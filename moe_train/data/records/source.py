"""Interfaces of record sources: `Records`, which a caller's own object implements, and `OpenSource`, which `prepare` reads.

class Orders:
    identity = "orders@2026-11-29"
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str: return f"orders.db, row {index}"

config.PythonSource(name="python", records=Orders(), record=config.ChatRecord(name="chat"))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from moe_train.data.records.problem import Item, Problem
from moe_train.data.records.scan import Scan


@runtime_checkable
class Records(Protocol):
    """Records that a caller's object holds.

    Length and random access work as for a `datasets.Dataset`, a Grain data source or a list. The same index always gives the
    same record. With `data.num_proc` above 1 the object is pickled.
    """

    @property
    def identity(self) -> str:
        """Text that changes whenever a record or the order changes, such as a hash, or a name with its version.

        Tokenized records are reused, and a run is resumed, only if it is the same.
        """
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return the columns of a record, which the section `record` names.

        Arguments and schemas must not hold nulls, since it is unclear whether a table has filled them in; state them as JSON text.
        """
        ...

    def where(self, index: int) -> str:
        """Return where a record comes from, for messages, such as `orders.db, row 17`."""
        ...


class Place(NamedTuple):
    """A part of a source with a name of its own: a file, a data set of the hub, or a caller's records."""

    name: str
    kind: str
    """The format of a file; otherwise text that, together with the hash, pins the content."""
    by_line: bool
    """Whether records are numbered by line rather than by row."""


class Origin(NamedTuple):
    """The location of a record: the place in its source, and the line or row there, counted from 1."""

    place: int
    number: int


class Span(NamedTuple):
    """Consecutive records of a place."""

    place: int
    start: int = 0
    """First byte; for a caller's records, first index."""
    stop: int | None = None
    """Byte or index at which the span stops; None for the end of the place."""
    line: int = 1
    """Number of the line on which the first record is."""


class OpenSource(ABC):
    """The records of one source. Every iteration reads them again, in the same order."""

    places: tuple[Place, ...]

    @abstractmethod
    def scan(self, memory: Path) -> list[Scan]:
        """Return the current content of each place, and where it can be cut.

        Args:
            memory: A folder for caching results that take long to compute.
        """

    @abstractmethod
    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """Yield (number, record) for each record of a span, or (number, Problem) if a record cannot be read."""

    def where(self, origin: Origin) -> str:
        """Return where a record comes from, for messages."""
        place = self.places[origin.place]
        return numbered(place.name, origin.number, place.by_line)

    def folder(self, place: int) -> Path | None:
        """Return the folder of a place, to which paths of pictures are relative; None if it is in no folder."""
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all places."""
        return tuple(place.name for place in self.places)

    def read(self, span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, record) for each record of a span.

        Raises:
            ValueError: With its location, for the first malformed record.
        """
        for number, record in self.examine(span):
            if isinstance(record, Problem):
                raise ValueError(f"{self.where(Origin(span.place, number))}: {record}") from record
            yield number, record

    def __iter__(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        for place in range(len(self.places)):
            for number, record in self.read(Span(place)):
                yield Origin(place, number), record


def numbered(name: str, number: int, by_line: bool) -> str:
    """Format a location as `path:line`, or `path: row N`."""
    return f"{name}{':' if by_line else ': row '}{number}"
