"""Read every record of a file for a command that needs all of them, or the line of the first that it cannot use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moe_train.data.records.files import format_of, is_json_lines, read_file
from moe_train.data.records.problem import Problem, located
from moe_train.data.records.unread import Unread

Read = TypeVar("Read")


def read_each(file: Path, what: str, column: str, read: Callable[[dict[str, Any], str], Read]) -> list[Read]:
    """Read the records of a file, in any format that records can have.

    Args:
        file: the file.
        what: what a record is (text, prompt), for messages.
        column: the column of a file of plain text.
        read: function (columns that are not null, location) -> what is read; what it reads it takes out of the columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record cannot be read, or there is none; the message begins with the file and the line.
    """
    remedy = f"write one JSON object with messages or {column} per line"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of {what}s; {remedy}")
    kind = format_of(file)
    results = []
    for line, fields in read_file(file, kind, is_json_lines(file, kind), column):
        location = f"{file}:{line}"
        if isinstance(fields, Problem):
            raise ValueError(f"{location}: {fields}")
        remaining = {key: value for key, value in fields.items() if value is not None}
        results.append(located(location, read, remaining, location))
    if not results:
        raise ValueError(f"{file} has no {what}s; {remedy}")
    return results


def refuse_unread(remaining: Mapping[str, Any], unread: Unread, known: str) -> None:
    """Raise Problem if a record has a key that was not read; `known` names those that are."""
    unknown = [*map(repr, remaining), *map(repr, unread.names)]
    if unknown:
        raise Problem("columns", f"key {unknown[0]} is not read", f"remove it; {known}")
