"""Files of records as what `check` examines at once: all of them, or a sample from all over."""

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

_ROWS, _CHARACTERS = 256, 1 << 20  # records that are no lines, and characters of their columns, in one chunk


@dataclass(frozen=True)
class Source:
    """Files, how their records are read (None: each recognised by its columns), and their share in a mixture."""

    files: tuple[str, ...]
    format: str = "auto"
    record: config.Record | None = None
    weight: float = 1.0


class Place(NamedTuple):
    """A file, its format, the source it belongs to, and what its records are counted by."""

    file: Path
    kind: str
    source: int
    counted: str  # line, row, or byte where lines were picked out

    def where(self, number: int) -> str:
        return f"{self.file}:{number}" if self.counted == "line" else f"{self.file}: {self.counted} {number}"


def places_of(sources: Sequence[Source], picked: bool) -> list[Place]:
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
    """The records of a file, one after the other."""
    text_column = section.column if isinstance(section, config.TextRecord) else "text"
    return files.read(place.file, place.kind, place.counted == "line", text_column)


def all_chunks(places: list[Place], question: Question) -> Iterator[tuple[Chunk, int]]:
    """Every record, and how many bytes of the files have been read."""
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
    """How much of the files a sample has read."""

    def __init__(self, wanted: int, sizes: list[int]) -> None:
        self.sizes = sizes
        total = max(sum(sizes), 1)
        self.quota = [max(1, round(wanted * size / total)) if size else 0 for size in sizes]
        self.picked_bytes = self.picked = self.picked_of = 0
        self.only_begun: list[str] = []

    def answer(self, records: int) -> dict[str, Any]:
        """of_about: what the length of the picked lines suggests; None where some file's records have no known number."""
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
    """Lines from all over a file, one in each of as many equal parts; of files that cannot be entered anywhere, the first
    records. The same every time."""
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
                        stream.readline(MAX_RECORD)  # the rest of the line that the goal is in
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
