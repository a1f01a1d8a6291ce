"""Problems in records, and checked access to their fields. The caller knows where a record is, and adds that with `located`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Problem(ValueError):
    """One problem with a record.

    Training raises the first one; `check` collects them all.

    Args:
        rule: Name of the rule that the record breaks.
        message: What was found.
        remedy: What to do about it.
    """

    def __init__(self, rule: str, message: str, remedy: str) -> None:
        super().__init__(rule, message, remedy)  # the arguments with which pickle rebuilds it in a worker's parent
        self.rule = rule
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class NoColumn(Problem):
    """A record lacks the column that its section names.

    Args:
        column: The name of the column.
        present: The names of the columns that the record has.
    """

    def __init__(self, column: str, present: Sequence[str]) -> None:
        super().__init__(
            "columns",
            f"no column {column!r}; the record has {', '.join(map(repr, present)) or 'none'}",
            "name it with --map (in a config: in the record section)",
        )
        self.column = column
        # Pickle passes `args` to the constructor again.
        self.args = (column, tuple(present))


Item = dict[str, Any] | Problem
"""The content at the place of a record: its columns, or the problem with it."""


def located(location: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with the arguments, and put `location` in front of the message of a ValueError that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def field(fields: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column. Raises NoColumn if there is none."""
    if column not in fields:
        raise NoColumn(column, list(fields))
    return fields[column]


def text_field(fields: Mapping[str, Any], column: str) -> str:
    """Return the text of a column. Raises Problem if there is no such column or it is not text."""
    value = fields.get(column)
    # ASCII cannot hold half a surrogate pair, which is all that remains to be checked of a str.
    if value.__class__ is str and value.isascii():
        return value  # the fast path for most texts
    return checked_text(field(fields, column), f"column {column!r}")


def checked_text(value: object, what: str) -> str:
    """Return `value` if it is text that can be encoded as UTF-8.

    Args:
        value: The value to check.
        what: The name of the value in a message.

    Raises:
        Problem: If it is not such a text.
    """
    if value is None:
        raise Problem("type", f"{what} is null or empty", "write its text, or drop the record")
    if not isinstance(value, str):
        raise Problem("type", f"{what} should be text, not {brief(value)}", "write it as a string")
    # JSON can escape half of a surrogate pair ("\ud800"), which Python accepts and UTF-8 cannot encode.
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Problem("unicode", f"{what} has half a surrogate pair at character {error.start}", "remove it") from error
    return value


def check_usable(fields: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raise the Problem that stands for the value of one of the given columns, which are those that are read.

    The value of a column of a table is replaced by a Problem if JSON cannot express it; a column that is not read does no harm.
    """
    for column in columns:
        value = fields.get(column)
        if isinstance(value, Problem):
            raise value


def usable(record: Item, columns: Sequence[str]) -> Item:
    """Return a record, or the Problem that `check_usable` raises for it."""
    if isinstance(record, Mapping):
        try:
            check_usable(record, columns)
        except Problem as problem:
            return problem
    return record


def brief(value: object) -> str:
    """Format a value for a message, with at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
