"""What a source of records is: `Records`, which a caller's own object provides, and `OpenSource`, which preparing reads.

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
    """Records that a caller holds. Length and random access are those of a `datasets.Dataset`, a Grain data source or a list.

    The same index always gives the same record. With `data.num_proc` above 1 the object is pickled.
    """

    @property
    def identity(self) -> str:
        """Text that changes whenever a record or the order changes, such as a hash, or a name with its version.

        Tokenized records are reused, and a run is resumed, where it is the same."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """The columns of a record, which the section `record` names."""
        ...

    def where(self, index: int) -> str:
        """Where a record comes from, for messages: `orders.db, row 17`."""
        ...


class Place(NamedTuple):
    """A part of a source that has a name of its own: a file, a data set of the hub, or a caller's records.

    kind: the format of a file; else what pins the content, together with its hash. by_line: whether records are numbered by
    line, or else by row.
    """

    name: str
    kind: str
    by_line: bool


class Origin(NamedTuple):
    """Where a record stands: which place of its source, and which line or row there, counted from 1."""

    place: int
    number: int


class Span(NamedTuple):
    """Consecutive records of a place: bytes (of a caller's records: indices) `start` to `stop`, or to the end where that is
    None. The first one stands on line `line`.
    """

    place: int
    start: int = 0
    stop: int | None = None
    line: int = 1


class OpenSource(ABC):
    """The records of one source. Iterating reads them again, always in the same order."""

    places: tuple[Place, ...]

    @abstractmethod
    def scan(self, memory: Path) -> list[Scan]:
        """What each place holds now, and where it can be cut. `memory` is a folder for answers that take long to find."""

    @abstractmethod
    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """(number, record) of a span, or (number, Problem) where a record cannot be read."""

    def where(self, origin: Origin) -> str:
        """Where a record comes from, for messages."""
        place = self.places[origin.place]
        return numbered(place.name, origin.number, place.by_line)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(place.name for place in self.places)

    def read(self, span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records of a span. Raises ValueError with the place of the first that is malformed."""
        for number, record in self.examine(span):
            if isinstance(record, Problem):
                raise ValueError(f"{self.where(Origin(span.place, number))}: {record}") from record
            yield number, record

    def __iter__(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        for place in range(len(self.places)):
            for number, record in self.read(Span(place)):
                yield Origin(place, number), record


def numbered(name: str, number: int, by_line: bool) -> str:
    """`path:line`, or `path: row N`."""
    return f"{name}{':' if by_line else ': row '}{number}"
