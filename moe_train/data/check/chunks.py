"""Divide files of records into the chunks that `check` examines: all records, or a sample from the whole corpus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from moe_train.data.check.findings import Chunk, Question
from moe_train.data.check.results import SampleResult
from moe_train.data.check.sources import CheckedFile, read_checked
from moe_train.data.records.file_bytes import MAX_RECORD, is_compressed, size_of
from moe_train.data.records.json_lines import Block, blocks
from moe_train.data.records.problem import Item

# Largest number of records that are not lines, and of characters in their columns, in one chunk.
_ROWS = 256
_CHARACTERS = 1 << 20


def all_chunks(places: list[CheckedFile], question: Question) -> Iterator[tuple[Chunk, int]]:
    """Yield every record in chunks, with the number of bytes of the files that have been read."""
    bytes_before = 0
    for i, place in enumerate(places):
        size = size_of(place.file)
        if place.kind == "json" and place.counted == "line":
            bytes_read = 0
            for block in blocks(place.file):
                # Lines that cannot be read are a Problem instead of bytes.
                bytes_read += len(block.lines) if isinstance(block.lines, bytes) else 0
                # The bytes of a compressed file are counted when all of it was read: blocks are of its expanded text.
                bytes_passed = 0 if is_compressed(place.file) else min(bytes_read, size)
                yield Chunk(i, block), bytes_before + bytes_passed
        else:
            rows = read_checked(place, question.records[i])
            for group in _grouped(rows):
                yield Chunk(i, group), bytes_before
        bytes_before += size


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
        num_records: Number of records to sample.
        sizes: Size of each file in bytes, which decides its share of the sample.
    """

    def __init__(self, num_records: int, sizes: list[int]) -> None:
        self.sizes = sizes
        total = max(sum(sizes), 1)
        # At least one record of each file that is not empty, so that every file is looked into.
        self.quota = [max(1, round(num_records * size / total)) if size else 0 for size in sizes]
        self.picked = 0
        """Number of lines read."""
        self.picked_bytes = 0
        """Their size."""
        self.picked_of = 0
        """Size of the files that they are from."""
        self.only_begun: list[str] = []
        """Files of which only the first records were read."""

    def result(self, records: int) -> SampleResult:
        """Return the coverage in JSON form.

        Args:
            records: Number of records in the sample.
        """
        about: int | None = None
        if self.picked_bytes and not self.only_begun:
            # The bytes of the sampled files over the mean length of their sampled lines.
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
    bytes_before = 0
    for i, (place, size, quota) in enumerate(zip(places, coverage.sizes, coverage.quota, strict=True)):
        if place.counted == "byte":
            lines = _sampled_lines(place, size, quota)
            coverage.picked += len(lines)
            coverage.picked_bytes += sum(len(line) for _, line in lines)
            coverage.picked_of += size
            for start in range(0, len(lines), _ROWS):
                sampled = [Block(number, line) for number, line in lines[start : start + _ROWS]]
                yield Chunk(i, sampled), bytes_before
        else:
            rows = read_checked(place, question.records[i])
            first_rows = list(itertools.islice(rows, quota))
            # A file that has no further row was read completely.
            if next(rows, None) is not None:
                coverage.only_begun.append(str(place.file))
            for group in _grouped(iter(first_rows)):
                yield Chunk(i, group), bytes_before
        bytes_before += size


def _sampled_lines(place: CheckedFile, size: int, quota: int) -> list[tuple[int, bytes]]:
    """Read at most `quota` lines of a file, from all over it, each with its number: the byte, from 1, at which it begins."""
    lines: list[tuple[int, bytes]] = []
    last_start = -1
    random_ = random.Random(0)  # a fixed seed, so that the same lines are read every time
    with place.file.open("rb") as stream:
        for k in range(quota):
            # A random byte of part k.
            goal = int((k + random_.random()) * size / quota)
            # From one byte before the goal, so that a line that begins exactly there is not skipped.
            stream.seek(max(goal - 1, 0))
            if goal:
                stream.readline(MAX_RECORD)  # skip the rest of the line that contains the goal
            line_start = stream.tell()
            line = stream.readline(MAX_RECORD)
            # A line that is longer than a part is met again from the next part.
            if line_start <= last_start or not line.strip():
                continue
            last_start = line_start
            lines.append((line_start + 1, line))
    return lines
