"""Read JSON values from a stream one after the other, such as the elements of an array, with only a few of them in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from moe_train.data.records.file_bytes import BLOCK, BOM, CUT_SHORT, MAX_RECORD, not_utf8
from moe_train.data.records.json_parser import Parser, unusable
from moe_train.data.records.problem import Item, Problem, brief


class Window:
    """The part of a text stream that is in memory, and the reading position in it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1
        self.position = 0
        # A byte order mark stands only at the very start, so it is removed before any decoding.
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
        # Before the text is cut: lines are counted in what is dropped.
        self._line = self.line_of(self.position)
        self.text = self.text[self.position :] + self._decoded(data)
        self.position = 0
        return bool(data)

    def line_of(self, index: int) -> int:
        """Return the line number of the character at index `index`."""
        return self._line + self.text.count("\n", 0, index)

    def skip_space(self) -> bool:
        """Skip white space. Returns False if the text ends here."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return True
            if not self.read_on(BLOCK):
                return False

    def next_is(self, characters: str) -> bool:
        """Skip white space, and return whether the next character is one of `characters`. Raises Problem if the text ends here."""
        if not self.skip_space():
            line = self.line_of(self.position)
            raise Problem("not-json", f"not JSON: the text ends on line {line} without a closing bracket", CUT_SHORT)
        return self.text[self.position] in characters

    def take(self, characters: str) -> bool:
        """Skip white space, and then the next character if it is one of `characters`.

        Returns:
            Whether that character was skipped.

        Raises:
            Problem: If the text ends here.
        """
        is_match = self.next_is(characters)
        # True counts as one character.
        self.position += is_match
        return is_match


def elements(window: Window, parser: Parser) -> Iterator[Item]:
    """Yield the elements of the array that begins at the window's position.

    Raises:
        Problem: If the array itself is malformed, so that nothing after this place can be read.
    """
    assert window.take("["), "the caller has looked"
    is_first = True
    while not window.take("]"):
        if not is_first and not window.take(","):
            raise missing_comma(window)
        # Skips white space and fails at the end of the text: the decoder itself does not skip leading white space.
        window.next_is("")
        is_first = False
        value, end = element(window, parser)
        yield parser.checked(value, window.text[window.position : end])
        window.position = end


def missing_comma(window: Window) -> Problem:
    """Return the problem for a text with something other than a comma or a closing bracket at the window's position."""
    excerpt = brief(window.text[window.position : window.position + 20])
    return Problem("not-json", f"not JSON: no , before {excerpt} on line {window.line_of(window.position)}", "put it there")


def element(window: Window, parser: Parser) -> tuple[Any, int]:
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
            # Relative to the value, since reading on drops the text before it and moves every index.
            fault = error.pos - window.position
            # Doubling what is buffered keeps the total work linear: the value is parsed anew after each read.
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
