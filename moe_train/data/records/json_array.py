"""Read the records of one JSON array element by element, with only a few of them in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.data.records.file_bytes import BLOCK, BOM, CUT_SHORT, MAX_RECORD, not_utf8, open_bytes
from moe_train.data.records.json_parser import Parser, unusable
from moe_train.data.records.problem import Item, Problem, brief


def is_array(file: Path) -> bool:
    """Return whether a JSON file is one array, rather than one record per line."""
    try:
        with open_bytes(file) as stream:
            while block := stream.read(1 << 12):
                text = block.removeprefix(BOM).lstrip()
                if text:
                    return text.startswith(b"[")
    except Problem:  # reading the records reports it again, with a line number
        pass
    return False


def read_array(file: Path) -> Iterator[tuple[int, Item]]:
    """Yield the elements of the array, counted from 1; a Problem ends it if nothing after it can be read."""
    number = 0
    try:
        with open_bytes(file) as stream:
            for number, item in _elements(_Window(stream)):
                yield number, item
    except Problem as problem:
        yield number + 1, problem


class _Window:
    """The part of a text stream that is in memory, and the reading position in it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1
        self.position = 0
        first = stream.read(BLOCK).removeprefix(BOM)
        self.text = self._decoded(first) if first else ""

    def _decoded(self, data: bytes) -> str:
        """Decode the next bytes; a character may continue in the next block."""
        try:
            return self._decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error) from error

    def read_on(self, size: int) -> bool:
        """Read more of the text and drop what is before `position`, which becomes 0. Returns False at the end of the stream."""
        data = self._stream.read(size)
        self._line = self.line_of(self.position)
        self.text = self.text[self.position :] + self._decoded(data)
        self.position = 0
        return bool(data)

    def line_of(self, index: int) -> int:
        """Return the line number of the character at index `index`."""
        return self._line + self.text.count("\n", 0, index)

    def take(self, characters: str) -> bool:
        """Skip white space, and then the next character if it is one of `characters`.

        Returns:
            Whether that character was skipped.

        Raises:
            Problem: If the text ends here.
        """
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                break
            if not self.read_on(BLOCK):
                raise Problem("not-json", f"not JSON: the array ends on line {self.line_of(self.position)} without ]", CUT_SHORT)
        is_match = self.text[self.position] in characters
        self.position += is_match
        return is_match

    def is_at_end(self) -> bool:
        """Return whether only white space follows."""
        if self.text[self.position :].strip():
            return False
        return not any(block.strip() for block in iter(lambda: self._stream.read(BLOCK), b""))


def _elements(window: _Window) -> Iterator[tuple[int, Item]]:
    """Yield the elements of the array, counted from 1.

    Raises:
        Problem: If the array itself is malformed, so that nothing after this place can be read.
    """
    parser = Parser()
    number = 0
    assert window.take("["), "is_array has found it"
    while not window.take("]"):
        if number and not window.take(","):
            excerpt = brief(window.text[window.position : window.position + 20])
            raise Problem("not-json", f"not JSON: no , before {excerpt} on line {window.line_of(window.position)}", "put it there")
        window.take("")
        number += 1
        value, end = _element(window, parser)
        yield number, parser.checked(value, window.text[window.position : end])
        window.position = end
    if not window.is_at_end():
        message = f"not JSON: something follows the array on line {window.line_of(window.position)}"
        raise Problem("not-json", message, "write one array, or one object a line")


def _element(window: _Window, parser: Parser) -> tuple[Any, int]:
    """Parse the value at the window's position, reading more text until all of it is in memory.

    Returns:
        The value, and the index at which it ends.
    """
    while True:
        try:
            value, end = parser.value(window.text, window.position)
        except json.JSONDecodeError as error:
            # An incomplete value raises the same error as a malformed one, so read on until it parses or the limit is reached.
            buffered = len(window.text) - window.position
            fault = error.pos - window.position
            if buffered > MAX_RECORD or not window.read_on(max(BLOCK, buffered)):
                message = f"not JSON: {error.msg} on line {window.line_of(window.position + fault)}"
                raise Problem("not-json", message, "write an array of objects, or one object a line") from error
        except (RecursionError, ValueError) as error:
            raise unusable(error) from error
        else:
            if end < len(window.text):
                return value, end
            if not window.read_on(BLOCK):  # a number at the end of the text may continue in the next block
                return value, len(window.text)
