"""Read JSON lines: blocks of lines from any position in a file, and the record of each line with its line number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_train.data.records.file_bytes import BLOCK, BOM, MAX_RECORD, open_bytes
from moe_train.data.records.json_parser import Parser
from moe_train.data.records.problem import Item, Problem


class Block(NamedTuple):
    """Complete lines, the first of which has number `line`; or the Problem with that line."""

    line: int
    lines: bytes | Problem


def blocks(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Block]:
    """Read the lines of a file in blocks of about 1 MiB.

    Args:
        file: The file.
        start: Byte at which to start; a line has to begin there.
        stop: Byte at which to stop: the line that contains it, or ends just before it, is the last. None for the end of the file.
        line: Number of the line that begins at `start`.

    Yields:
        Blocks of complete lines. A line longer than `MAX_RECORD`, or one that cannot be read, is a Problem in a block of its own.
    """
    pieces: list[bytes] = []  # parts of a line that continues in the next data; empty if the line is too long to keep
    pending_size = 0  # length of that line so far, in bytes
    position = start
    try:
        with open_bytes(file) as stream:
            if start:
                stream.seek(start)
            while data := stream.read(BLOCK if stop is None else max(min(BLOCK, stop - position), 1)):
                position += len(data)
                # The last line of this part extends beyond `stop`; the next part begins after it.
                if stop is not None and position >= stop and not data.endswith(b"\n"):
                    rest = stream.readline(MAX_RECORD)
                    data += rest
                    position += len(rest)
                end = data.rfind(b"\n") + 1
                if not end:
                    pending_size += len(data)
                    if pending_size <= MAX_RECORD:
                        pieces.append(data)
                    else:
                        pieces.clear()
                # Line numbers go on as if the line had been read, so that later errors name the right line.
                elif pending_size > MAX_RECORD:  # the line that ends here is too long
                    first = data.index(b"\n") + 1
                    yield Block(line, _too_long())
                    line += 1
                    if first < end:
                        yield Block(line, data[first:end])
                        line += data.count(b"\n", first, end)
                    pieces = [data[end:]]
                    pending_size = len(data) - end
                else:
                    lines = b"".join([*pieces, data[:end]])
                    yield Block(line, lines)
                    line += lines.count(b"\n")
                    pieces = [data[end:]]
                    pending_size = len(data) - end
                if stop is not None and position >= stop:
                    break
    except Problem as problem:
        if any(pieces):
            yield Block(line, b"".join(pieces))
        yield Block(line, problem)
        return
    if pending_size > MAX_RECORD:
        yield Block(line, _too_long())
    elif any(pieces):
        yield Block(line, b"".join(pieces))


def _too_long() -> Problem:
    """Return the problem for a line that is too long."""
    return Problem("not-json", f"the line is longer than {MAX_RECORD >> 20} MiB", "split it into records of their own")


def records_in(block: Block) -> Iterator[tuple[int, Item]]:
    """Yield the line number and the record of each line in a block; blank lines are skipped."""
    if isinstance(block.lines, Problem):
        yield block.line, block.lines
        return
    parser = Parser()
    # Not splitlines, which also ends a line at a carriage return, while `blocks` counts lines by their \n.
    for number, line in enumerate(block.lines.split(b"\n"), start=block.line):
        # A byte order mark is only allowed at the start of the file, and line 1 is only in its first block.
        if number == 1:
            line = line.removeprefix(BOM)
        line = line.strip()
        if line:
            yield number, parser.record(line)


def read_lines(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[tuple[int, Item]]:
    """Yield the line number and the record of each line; the arguments are those of `blocks`."""
    for block in blocks(file, start, stop, line):
        yield from records_in(block)
