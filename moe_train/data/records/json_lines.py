"""Records of JSON lines: the lines of a file in blocks, from anywhere in it, and the record of each with its line number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_train.data.records.file_bytes import BLOCK, BOM, MAX_RECORD, opened
from moe_train.data.records.json_parser import Parser
from moe_train.data.records.problem import Item, Problem


class Block(NamedTuple):
    """Whole lines, of which the first is number `line`; or what is wrong with that line."""

    line: int
    lines: bytes | Problem


def blocks(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Block]:
    """The lines of a file in blocks of about 1 MiB, from byte `start`, where line `line` begins, to the line that byte
    `stop` is in or before."""
    pieces: list[bytes] = []  # of a line that goes on in the next data, unless it is too long to be held
    held = 0  # bytes of that line
    at = start
    try:
        with opened(file) as stream:
            if start:
                stream.seek(start)
            while data := stream.read(BLOCK if stop is None else max(min(BLOCK, stop - at), 1)):
                at += len(data)
                if stop is not None and at >= stop and not data.endswith(b"\n"):
                    rest = stream.readline(MAX_RECORD)
                    data, at = data + rest, at + len(rest)
                end = data.rfind(b"\n") + 1
                if not end:
                    held += len(data)
                    if held <= MAX_RECORD:
                        pieces.append(data)
                    else:
                        pieces.clear()
                elif held > MAX_RECORD:  # the end of a line that is too long
                    first = data.index(b"\n") + 1
                    yield Block(line, _too_long())
                    line += 1
                    if first < end:
                        yield Block(line, data[first:end])
                        line += data.count(b"\n", first, end)
                    pieces, held = [data[end:]], len(data) - end
                else:
                    whole = b"".join([*pieces, data[:end]])
                    yield Block(line, whole)
                    line += whole.count(b"\n")
                    pieces, held = [data[end:]], len(data) - end
                if stop is not None and at >= stop:
                    break
    except Problem as problem:
        if any(pieces):
            yield Block(line, b"".join(pieces))
        yield Block(line, problem)
        return
    if held > MAX_RECORD:
        yield Block(line, _too_long())
    elif any(pieces):
        yield Block(line, b"".join(pieces))


def _too_long() -> Problem:
    return Problem("not-json", f"the line is longer than {MAX_RECORD >> 20} MiB", "split it into records of their own")


def records_in(block: Block) -> Iterator[tuple[int, Item]]:
    """The records in a block, and the line number of each; blank lines are none."""
    if isinstance(block.lines, Problem):
        yield block.line, block.lines
        return
    parser = Parser()
    for number, line in enumerate(block.lines.split(b"\n"), start=block.line):
        if number == 1:
            line = line.removeprefix(BOM)
        line = line.strip()
        if line:
            yield number, parser.record(line)


def read_lines(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[tuple[int, Item]]:
    """The records of the lines that `blocks` gives, and the line number of each."""
    for block in blocks(file, start, stop, line):
        yield from records_in(block)
