"""Find records by a text that they contain or by a hash, in any file of records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.data.records import files
from moe_train.data.records.local_files import expand_files
from moe_train.data.records.source import numbered
from moe_train.machine.files import Json


class Wanted(NamedTuple):
    """What to look for: exactly one of both."""

    pattern: re.Pattern[str] | None = None
    """Found anywhere in a text of the record, unescaped."""
    sha256: str | None = None
    """Hash of the whole record (see `hash_of_record`), or of one of its texts."""

    def matches(self, record: Json) -> bool:
        """Return whether a record is meant."""
        if self.pattern is not None:
            return any(self.pattern.search(text) for text in texts_in(record))
        return hash_of_record(record) == self.sha256 or any(_sha256(text) == self.sha256 for text in texts_in(record))

    def in_text(self, text: str) -> bool:
        """Return whether a text, such as the decoded tokens of an example, contains the pattern; a hash cannot be found there."""
        return self.pattern is not None and self.pattern.search(text) is not None


class LocatedRecord(NamedTuple):
    """A record in a file."""

    file: str
    number: int
    """Line or row, counted from 1."""
    location: str
    """`file:line`, or `file: row N`."""
    sha256: str
    """See `hash_of_record`."""


def wanted(pattern: str | None, sha256: str | None, is_regex: bool) -> Wanted:
    """Return what the options of a command ask for.

    Args:
        pattern: A text, compared without regard to case; None if a hash is stated.
        sha256: 64 hexadecimal digits; None if a pattern is stated.
        is_regex: Whether the pattern is a regular expression, in which case counts.

    Raises:
        ValueError: Neither or both are stated, or one is malformed.
    """
    if (pattern is None) == (sha256 is None):
        raise ValueError("state either PATTERN, a text that the record contains, or --hash")
    if sha256 is not None:
        if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"--hash {sha256[:80]} is no sha256; it has 64 hexadecimal digits")
        return Wanted(sha256=sha256.lower())
    assert pattern is not None
    if not pattern.strip():
        raise ValueError("PATTERN is empty, and every record would match; state a text")
    try:
        return Wanted(re.compile(pattern) if is_regex else re.compile(re.escape(pattern), re.IGNORECASE))
    except re.error as error:
        raise ValueError(f"PATTERN {pattern!r} is no regular expression: {error}") from None


def hash_of_record(record: Json) -> str:
    """Return the sha256 of a record's JSON form with sorted keys and without spaces, the same in every file format."""
    return _sha256(json.dumps(record, sort_keys=True, separators=(",", ":"), default=str))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def texts_in(value: object) -> Iterator[str]:
    """Yield every text and number in a JSON value, keys of objects excluded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def search_file(path: Path, file_format: str, looked_for: Wanted) -> Iterator[LocatedRecord]:
    """Yield the matching records of a file; records that cannot be read are never trained on, and passed over."""
    for number, record in records_of(path, file_format):
        if looked_for.matches(record):
            location = numbered(str(path), number, _is_by_line(path, file_format))
            yield LocatedRecord(str(path), number, location, hash_of_record(record))


def records_of(path: Path, file_format: str) -> Iterator[tuple[int, dict[str, Json]]]:
    """Yield (line or row, record) for each record of a file that can be read."""
    kind = _kind(path, file_format)
    for number, item in files.read_file(path, kind, _is_by_line(path, file_format), "text"):
        if isinstance(item, dict):
            yield number, item


def _is_by_line(path: Path, file_format: str) -> bool:
    kind = _kind(path, file_format)
    return kind == "text" or files.is_json_lines(path, kind)


def _kind(path: Path, file_format: str) -> str:
    """Return the format of a file, by its name if it is not stated."""
    section = {"name": "files", "files": (str(path),), "format": file_format, "record": {"name": "text"}}
    ((_, kind),) = expand_files(config.FileSource.model_validate(section)).files
    return kind
