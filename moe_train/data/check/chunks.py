"""Divide files of records into the chunks that `check` examines: all records, or a sample from the whole corpus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.check.findings import Chunk, Question
from moe_train.data.records import files
from moe_train.data.records.file_bytes import MAX_RECORD, is_compressed, size_of
from moe_train.data.records.json_lines import Block, blocks
from moe_train.data.records.local_files import expand_files
from moe_train.data.records.problem import Item

# Largest number of records that are not lines, and of characters in their columns, in one chunk.
_ROWS = 256
_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class CheckedSource:
    """A group of files that are read in the same way."""

    files: tuple[str, ...]
    """Paths, folders or globs."""
    format: str = "auto"
    """The file format; "auto" to decide by the file name."""
    record: config.Record | None = None
    """How to read the records; None to recognize each by its columns."""
    ignore: tuple[str, ...] = ()
    """Keys that are not to be read, if records are recognized by their columns."""
    weight: float | None = None
    """The share of the files in a mixture; None if every row is seen once in an epoch."""


class CheckedFile(NamedTuple):
    """A file to check."""

    file: Path
    kind: str
    """The format of the file."""
    source: int
    """Index of the source that the file belongs to."""
    counted: str  # line, row, or byte if lines are sampled

    def where(self, number: int) -> str:
        """Return the location of a record, for messages."""
        if self.counted == "line":
            return f"{self.file}:{number}"
        return f"{self.file}: {self.counted} {number}"


def places_of(sources: Sequence[CheckedSource], picked: bool) -> list[CheckedFile]:
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
        for file, kind in expand_files(section):
            is_json_lines = files.is_json_lines(file, kind)
            if picked and is_json_lines and not is_compressed(file):
                counted = "byte"
            elif is_json_lines or kind == "text":
                counted = "line"
            else:
                counted = "row"
            places.append(CheckedFile(file, kind, i, counted))
    return places


def read_checked(place: CheckedFile, section: config.Record | None) -> Iterator[tuple[int, Item]]:
    """Yield the records of a file, one after the other."""
    text_column = "text"
    if isinstance(section, config.TextRecord):
        text_column = section.column
    return files.read_file(place.file, place.kind, place.counted == "line", text_column)


def all_chunks(places: list[CheckedFile], question: Question) -> Iterator[tuple[Chunk, int]]:
    """Yield every record in chunks, with the number of bytes of the files that have been read."""
    before = 0
    for i, place in enumerate(places):
        size = size_of(place.file)
        if place.kind == "json" and place.counted == "line":
            done = 0
            for block in blocks(place.file):
                done += len(block.lines) if isinstance(block.lines, bytes) else 0
                yield Chunk(i, block), before + (0 if is_compressed(place.file) else min(done, size))
        else:
            rows = read_checked(place, question.records[i])
            for group in _grouped(rows):
                yield Chunk(i, group), before
        before += size


def _grouped(rows: Iterator[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """Group rows into chunks of bounded size."""
    group: list[tuple[int, Item]] = []
    characters_left = _CHARACTERS
    for number, item in rows:
        group.append((number, item))
        if isinstance(item, dict):
            characters_left -= sum(len(value) for value in item.values() if isinstance(value, str))
        if len(group) == _ROWS or characters_left <= 0:
            yield group
            group = []
            characters_left = _CHARACTERS
    if group:
        yield group


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
        about: int | None = None
        if self.picked_bytes and not self.only_begun:
            about = round(self.picked_of * self.picked / self.picked_bytes)
        return {
            "records": records,
            "of_about": None if about is None else max(about, records),
            "share": None if about is None else min(1.0, records / max(about, 1)),
            "files": len(self.sizes),
            "bytes": sum(self.sizes),
            "only_begun": self.only_begun,
        }


def some_chunks(places: list[CheckedFile], question: Question, coverage: Coverage) -> Iterator[tuple[Chunk, int]]:
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
                    line_start = stream.tell()
                    line = stream.readline(MAX_RECORD)
                    if line_start <= last or not line.strip():
                        continue
                    last = line_start
                    coverage.picked += 1
                    coverage.picked_bytes += len(line)
                    lines.append(Block(line_start + 1, line))
            coverage.picked_of += size
            for start in range(0, len(lines), _ROWS):
                yield Chunk(i, lines[start : start + _ROWS]), before
        else:
            rows = read_checked(place, question.records[i])
            first_rows = list(itertools.islice(rows, quota))
            if next(rows, None) is not None:
                coverage.only_begun.append(str(place.file))
            for group in _grouped(iter(first_rows)):
                yield Chunk(i, group), before
        before += size
