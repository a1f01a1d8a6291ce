"""Divide files of records into the chunks that `check` examines: all records, or a sample from the whole corpus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.check.examine import Chunk, Question
from moe_train.data.records import files
from moe_train.data.records.file_bytes import MAX_RECORD, is_compressed
from moe_train.data.records.json_lines import Block, blocks
from moe_train.data.records.local_files import resolve
from moe_train.data.records.problem import Item

_ROWS, _CHARACTERS = 256, 1 << 20  # largest number of records that are not lines, and of characters in their columns, in one chunk


@dataclass(frozen=True)
class Source:
    """A group of files that are read in the same way."""

    files: tuple[str, ...]
    """Paths, folders or globs."""
    format: str = "auto"
    """The file format; "auto" to decide by the file name."""
    record: config.Record | None = None
    """How to read the records; None to recognize each by its columns."""
    weight: float = 1.0
    """The share of the files in a mixture."""


class Place(NamedTuple):
    """A file to check."""

    file: Path
    kind: str
    """The format of the file."""
    source: int
    """Index of the source that the file belongs to."""
    counted: str  # line, row, or byte if lines are sampled

    def where(self, number: int) -> str:
        """Return the location of a record, for messages."""
        return f"{self.file}:{number}" if self.counted == "line" else f"{self.file}: {self.counted} {number}"


def places_of(sources: Sequence[Source], picked: bool) -> list[Place]:
    """Return the files of all sources.

    Args:
        sources: The sources.
        picked: Whether lines will be sampled, so that uncompressed JSON lines are located by byte.
    """
    places = []
    for i, source in enumerate(sources):
        record = source.record or config.TextRecord(name="text")
        section = config.FileSource.model_validate(
            {"name": "files", "files": source.files, "format": source.format, "record": record}
        )
        for file, kind in resolve(section):
            lines = files.is_json_lines(file, kind)
            anywhere = picked and lines and not is_compressed(file)
            places.append(Place(file, kind, i, "byte" if anywhere else "line" if lines or kind == "text" else "row"))
    return places


def read(place: Place, section: config.Record | None) -> Iterator[tuple[int, Item]]:
    """Yield the records of a file, one after the other."""
    text_column = section.column if isinstance(section, config.TextRecord) else "text"
    return files.read(place.file, place.kind, place.counted == "line", text_column)


def all_chunks(places: list[Place], question: Question) -> Iterator[tuple[Chunk, int]]:
    """Yield every record in chunks, with the number of bytes of the files that have been read."""
    before = 0
    for i, place in enumerate(places):
        size = place.file.stat().st_size
        if place.kind == "json" and place.counted == "line":
            done = 0
            for block in blocks(place.file):
                done += len(block.lines) if isinstance(block.lines, bytes) else 0
                yield Chunk(i, block), before + (0 if is_compressed(place.file) else min(done, size))
        else:
            rows = read(place, question.records[i])
            for some in _grouped(rows):
                yield Chunk(i, some), before
        before += size


def _grouped(rows: Iterator[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """Group rows into chunks of bounded size."""
    some: list[tuple[int, Item]] = []
    room = _CHARACTERS
    for number, item in rows:
        some.append((number, item))
        room -= sum(len(value) for value in item.values() if isinstance(value, str)) if isinstance(item, dict) else 0
        if len(some) == _ROWS or room <= 0:
            yield some
            some, room = [], _CHARACTERS
    if some:
        yield some


class Coverage:
    """The part of the files that a sample has read.

    Args:
        wanted: Number of records to sample.
        sizes: Size of each file in bytes, which decides its share of the sample.
    """

    def __init__(self, wanted: int, sizes: list[int]) -> None:
        self.sizes = sizes
        total = max(sum(sizes), 1)
        self.quota = [max(1, round(wanted * size / total)) if size else 0 for size in sizes]
        self.picked_bytes = self.picked = self.picked_of = 0
        self.only_begun: list[str] = []

    def answer(self, records: int) -> dict[str, Any]:
        """Return the coverage in JSON form.

        `of_about` is the total number of records, estimated from the lengths of the sampled lines; it is None if the number of
        records of some file cannot be estimated.
        """
        about = round(self.picked_of * self.picked / self.picked_bytes) if self.picked_bytes and not self.only_begun else None
        return {
            "records": records,
            "of_about": None if about is None else max(about, records),
            "share": None if about is None else min(1.0, records / max(about, 1)),
            "files": len(self.sizes),
            "bytes": sum(self.sizes),
            "only_begun": self.only_begun,
        }


def some_chunks(places: list[Place], question: Question, coverage: Coverage) -> Iterator[tuple[Chunk, int]]:
    """Yield a sample in chunks, with the number of bytes of the files that have been passed; it is the same every time.

    A file is divided into as many equal parts as lines are wanted, and one line is taken from each part. From files that can only
    be read from the beginning, the first records are taken.
    """
    before = 0
    for i, (place, size, quota) in enumerate(zip(places, coverage.sizes, coverage.quota, strict=True)):
        if place.counted == "byte":
            lines: list[Block] = []
            with place.file.open("rb") as stream:
                last = -1
                chosen = random.Random(0)
                for k in range(quota):
                    goal = int((k + chosen.random()) * size / quota)
                    stream.seek(max(goal - 1, 0))
                    if goal:
                        stream.readline(MAX_RECORD)  # skip the rest of the line that contains the goal
                    at = stream.tell()
                    line = stream.readline(MAX_RECORD)
                    if at <= last or not line.strip():
                        continue
                    last = at
                    coverage.picked += 1
                    coverage.picked_bytes += len(line)
                    lines.append(Block(at + 1, line))
            coverage.picked_of += size
            for start in range(0, len(lines), _ROWS):
                yield Chunk(i, lines[start : start + _ROWS]), before
        else:
            rows = read(place, question.records[i])
            some = list(itertools.islice(rows, quota))
            if next(rows, None) is not None:
                coverage.only_begun.append(str(place.file))
            for group in _grouped(iter(some)):
                yield Chunk(i, group), before
        before += size
