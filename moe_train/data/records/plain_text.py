"""Read the records of a text file: one record, or several of bounded size if the file is long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_train.data.records.file_bytes import BOM, not_utf8, open_bytes
from moe_train.data.records.problem import Problem

MAX_TEXT = 4 << 20  # largest size of a record in bytes


def read_text(file: Path) -> Iterator[tuple[int, str | Problem]]:
    """Read a file as texts of at most `MAX_TEXT` bytes.

    A file of up to that size is one text. A longer one is cut after an empty line if possible, otherwise after a line, a word or
    a character.

    Yields:
        The line on which the text begins, and the text; or the line at fault, and a Problem.
    """
    line = 1
    position = 0
    buffer = b""
    has_more = True
    try:
        with open_bytes(file) as stream:
            while has_more:
                # One byte past the limit tells whether more follows.
                while len(buffer) <= MAX_TEXT and (data := stream.read(MAX_TEXT + 1 - len(buffer))):
                    buffer += data
                has_more = len(buffer) > MAX_TEXT
                cut = _text_end(buffer) if has_more else len(buffer)
                try:
                    # Only the start of the file can hold a byte order mark; elsewhere the same bytes are a character of the text.
                    yield line, buffer[:cut].removeprefix(b"" if position else BOM).decode()
                except UnicodeDecodeError as error:
                    yield line + buffer.count(b"\n", 0, error.start), not_utf8(error, position)
                line += buffer.count(b"\n", 0, cut)
                position += cut
                buffer = buffer[cut:]
    except Problem as problem:
        yield line, problem


def _text_end(data: bytes) -> int:
    """Return where to cut data longer than `MAX_TEXT`: in the second half of the limit, if there is any border."""
    # Not before half the limit, so that a lone early border does not leave tiny records.
    for border in (b"\n\n", b"\n", b" "):
        start = data.rfind(border, MAX_TEXT // 2, MAX_TEXT)
        if start >= 0:
            return start + len(border)
    # Cut where no UTF-8 continuation byte follows; data that are not UTF-8 are cut anywhere.
    return next((k for k in range(MAX_TEXT, MAX_TEXT - 4, -1) if data[k] & 0xC0 != 0x80), MAX_TEXT)
