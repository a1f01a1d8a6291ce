"""Parse one JSON value strictly by the standard: no NaN, no duplicate keys in an object, limited nesting."""

from __future__ import annotations

import json
import math
from typing import Any

from moe_train.data.records.file_bytes import looks_like_utf16, not_utf8, utf16
from moe_train.data.records.problem import Item, Problem, brief

MAX_DEPTH = 100
"""Largest depth of nested lists and objects."""


class Parser:
    """Python's JSON decoder, extended to notice what it accepts although the standard forbids it.

    Args:
        finite: Whether to notice numbers that are too large for a float, too.
    """

    def __init__(self, finite: bool = False) -> None:
        self.faults: list[str] = []  # in the value that was decoded last
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float if finite else None
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Build an object, noting a duplicate key."""
        # Python keeps the last of equal keys without a word, so half of such a record would be lost.
        members = dict(pairs)
        if len(members) < len(pairs):
            self.faults.append(f"the key {brief(_duplicate_key(pairs))} stands twice in an object")
        return members

    def _constant(self, name: str) -> float:
        """Note NaN or Infinity, and return a placeholder."""
        # Noted rather than raised, so that decoding goes on and the end of the value is known.
        self.faults.append(f"{name} is no JSON number")
        return 0.0

    def _float(self, digits: str) -> float:
        """Return a number, noting one that is too large."""
        number = float(digits)
        # Python reads 1e999 as infinity, which cannot be written as JSON again.
        if math.isinf(number):
            self.faults.append(f"the number {brief(digits)} is too large")
        return number

    def record(self, line: bytes) -> Item:
        """Return the record in a line without surrounding white space, or a Problem."""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            return not_utf8(error)
        try:
            value, end = self.value(text, 0)
            if end < len(text):
                self._decoder.decode(text)  # raises an error that describes the rest
        except json.JSONDecodeError as error:
            if looks_like_utf16(line):
                return utf16()
            if text.startswith("\ufeff"):
                return Problem("not-json", "not JSON: a byte order mark, which only a file may begin with", "remove it")
            if "\0" in text:
                return Problem("not-json", f"not JSON: a NUL at column {text.index(chr(0)) + 1}", "is it a damaged text file?")
            message = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            return Problem("not-json", f"not JSON: {message}", "write one JSON object a line")
        except (RecursionError, ValueError) as error:
            return unusable(error)
        return self.checked(value, text)

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """Decode the value that begins at character `at`. Call `checked` with it before decoding the next value.

        Returns:
            The value, and the index at which it ends.

        Raises:
            JSONDecodeError: If the text is not JSON.
            RecursionError: If the nesting is too deep; see `unusable`.
            ValueError: If Python cannot represent the value; see `unusable`.
        """
        # One parser serves a whole file, so the faults of the value before must not be charged to this one.
        self.faults.clear()
        return self._decoder.raw_decode(text, at)

    def checked(self, value: Any, text: str) -> Item:
        """Return the value that was decoded last, or a Problem if it is not a record in standard JSON.

        Args:
            value: The value.
            text: The text that it was decoded from.
        """
        if self.faults:
            return Problem("not-json", f"not JSON: {self.faults[0]}", "write each key once, and numbers as JSON has them")
        if not isinstance(value, dict):
            kind = {list: "a list", str: "text", type(None): "null", bool: "a truth value"}.get(type(value), "a number")
            return Problem("not-a-record", f"a record should be an object {{…}}, not {kind}", "write one object for each record")
        # Counting brackets is much cheaper than measuring the depth, which can be no larger than their number.
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            return unusable(RecursionError())
        return value


def parse_strictly(text: str) -> Any:
    """Parse JSON text that is a value inside of a record.

    Raises:
        ValueError: In a few words, if the text is not standard JSON or nests too deep.
    """
    parser = Parser(finite=True)
    text = text.strip()
    try:
        value, end = parser.value(text, 0)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(unusable(error).message) from error
    if end < len(text):
        raise ValueError(f"something follows the value at character {end}")
    if parser.faults:
        raise ValueError(parser.faults[0])
    if value.__class__ in (dict, list) and _depth(value) > MAX_DEPTH:
        raise ValueError(unusable(RecursionError()).message)
    return value


def unusable(error: Exception) -> Problem:
    """Return the problem for JSON that Python cannot represent."""
    if isinstance(error, RecursionError):
        return Problem("not-json", f"not JSON that can be used: nested deeper than {MAX_DEPTH} levels", "write it flatter")
    return Problem("not-json", f"not JSON that can be used: {error}", "write long numbers as text")


def _duplicate_key(pairs: list[tuple[str, Any]]) -> str:
    """Return the first key that is the same as an earlier one."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is a duplicate")


def _depth(value: Any) -> int:
    """Return the depth of nested lists and objects, without recursion."""
    depth = 0
    level = [value]
    while level:
        depth += 1
        next_level: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            next_level += [item for item in items if item.__class__ in (dict, list)]
        level = next_level
    return depth
