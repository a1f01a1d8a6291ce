"""Read the records of a JSON file that is not one record a line: an array, an object that wraps one, or objects over several lines.

An object wraps an array of records if it has exactly one list, under one of the keys `WRAPPERS`, such as {"data": [{…}, …]}. Other
keys beside it may only describe the file (`_ABOUT`, such as `version`); anything else would be left unread, and is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from moe_train.data.records.file_bytes import BOM, CUT_SHORT, open_bytes
from moe_train.data.records.json_array import Window, element, elements, missing_comma
from moe_train.data.records.json_parser import Parser, parse_strictly
from moe_train.data.records.problem import Item, Problem, brief

WRAPPERS = ("data", "records", "examples", "rows", "items", "instances", "samples", "train", "validation", "test")
"""Keys under which a file may have all its records."""
_ABOUT = {
    *("version", "name", "title", "description", "license", "licence", "author", "source", "homepage", "url", "citation"),
    *("date", "created", "created_at", "count", "total", "split", "language"),
}
"""Keys beside the records that say something about the file, and nothing about a record."""
_LOOKED_AT = 1 << 16  # characters from which the form of a file is told
# Quantifiers are possessive (`++`, `*+`), so that matching takes linear time whatever the text.
_TEXT = r'"(?:[^"\\]++|\\.)*+"'
_SCALAR = rf"(?:{_TEXT}|[-+.\w]++)"
_WRAPPER = re.compile(rf'\s*+\{{\s*+((?:{_TEXT}\s*+:\s*+{_SCALAR}\s*+,\s*+)*+)"({"|".join(WRAPPERS)})"\s*+:\s*+(?=\[\s*+[{{\]])')
_TEXTS_AND_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+("?)|[{}\[\]]')
_ADVICE = "write the records as one array, or one object a line"


def is_lines(file: Path) -> bool:
    """Return whether a JSON file has one record per line, by its first lines; opens the file."""
    try:
        with open_bytes(file) as stream:
            data = b""
            # White space at the start is dropped, so one read may leave too little to look at.
            while len(data) < _LOOKED_AT and (block := stream.read(_LOOKED_AT)):
                data = (data + block).removeprefix(BOM).lstrip()
    except Problem:  # reading the records reports it again, with a line number
        return True
    # The limit may cut a character in two; only the structure is looked at.
    text = data[:_LOOKED_AT].decode("utf-8", "replace")
    if text.startswith("["):
        return False
    return not text.startswith("{") or not (_wrapper(text) or _continues(text))


def read_document(file: Path) -> Iterator[tuple[int, Item]]:
    """Yield the records, counted from 1; a Problem ends them if nothing after it can be read."""
    number = 0
    try:
        with open_bytes(file) as stream:
            for number, item in enumerate(_records(Window(stream)), start=1):
                yield number, item
    except Problem as problem:
        # After what is malformed, where the next record begins is unknown.
        end = "" if problem.remedy == CUT_SHORT else "; nothing after it is read"
        yield number + 1, Problem(problem.rule, problem.message + end, problem.remedy)


def _records(window: Window) -> Iterator[Item]:
    """Yield the records of an array or of a series of objects. Raises Problem where nothing more can be read."""
    parser = Parser()
    if window.skip_space() and window.next_is("["):
        yield from elements(window, parser)
        if window.skip_space():
            message = f"not JSON: something follows the array on line {window.line_of(window.position)}"
            raise Problem("not-json", message, "write one array, or one object a line")
    # Objects one after the other, each over several lines; any of them may wrap an array.
    while window.skip_space():
        if len(window.text) - window.position < _LOOKED_AT:
            window.read_on(_LOOKED_AT)
        wrapper = _wrapper(window.text[window.position : window.position + _LOOKED_AT])
        if wrapper is None:
            value, end = element(window, parser)
            yield parser.checked(value, window.text[window.position : end])
            window.position = end
        else:
            yield from _wrapped(window, wrapper, parser)


def _wrapped(window: Window, wrapper: re.Match[str], parser: Parser) -> Iterator[Item]:
    """Yield the records of an object that wraps an array of them. Raises Problem if it holds anything else that has a meaning."""
    line = window.line_of(window.position)
    key = wrapper[2]
    try:
        # The members before the records, which the regular expression found to be scalars, as an object of their own.
        before = parse_strictly("{" + wrapper[1].rstrip().removesuffix(",") + "}")
    except ValueError as error:
        raise Problem("not-json", f"not JSON: {error} of the object on line {line}", _ADVICE) from error
    for name in before:
        if name not in _ABOUT:
            raise _beside(name, key, line)
    window.position += wrapper.end()
    yield from elements(window, parser)
    while not window.take("}"):
        if not window.take(","):
            raise missing_comma(window)
        window.next_is("")
        name, end = element(window, parser)
        window.position = end
        if not isinstance(name, str) or not window.take(":"):
            raise missing_comma(window)
        # A list or an object could be more records, whatever its key.
        if name not in _ABOUT or window.next_is("[{"):
            raise _beside(name, key, window.line_of(window.position))
        _, window.position = element(window, parser)


def _beside(name: str, key: str, line: int) -> Problem:
    """Return the problem for an object that has more than a list of records and words about the file."""
    message = f"the object on line {line} has the records {brief(key)} and beside them {brief(name)}, which is not read"
    advice = "write a file for each" if name in WRAPPERS else _ADVICE
    return Problem("not-a-record", message, advice)


def _wrapper(text: str) -> re.Match[str] | None:
    """Return the match of the beginning of an object that wraps an array of records; None if the text begins otherwise."""
    match = _WRAPPER.match(text)
    if match is None:
        return None
    # The match ends before the bracket of the list.
    first = text[match.end() + 1 :].lstrip()
    try:
        record, _ = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):  # longer than the text that is looked at
        return match
    # A list of messages is a conversation: the record itself, under a key that the config names.
    is_message = isinstance(record, dict) and ("role" in record or "from" in record)
    return None if is_message else match


def _continues(text: str) -> bool:
    """Return whether the object that begins on the first line continues on the next, rather than being damaged."""
    first, _, rest = text.partition("\n")
    rest = rest.lstrip()
    if not rest:
        return False
    opened: list[str] = []
    for match in _TEXTS_AND_BRACKETS.finditer(first):
        token = match[0]
        if token[0] == '"':
            if not match[1]:  # the text has no end on this line
                return False
        elif token in "{[":
            opened.append(token)
        elif not opened or opened.pop() + token not in ("{}", "[]"):
            return False
    if not opened:
        return False
    # Inside an object, a key, a comma or its end must follow; anything else is a new record after a damaged line.
    if opened[-1] == "{" and not first.rstrip().endswith(":"):
        return rest[0] in '"},'
    return True
