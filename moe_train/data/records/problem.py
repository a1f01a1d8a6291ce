"""What is in a record, checked; the caller knows where the record stands, and `located` says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Problem(ValueError):
    """One thing that is wrong with a record: the name of the rule that it breaks, what was found, and what to do.

    Training raises the first one; `check` gathers them all.
    """

    def __init__(self, rule: str, message: str, remedy: str) -> None:
        super().__init__(rule, message, remedy)  # what pickle gives back to a worker's parent
        self.rule, self.message, self.remedy = rule, message, remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


Item = dict[str, Any] | Problem
"""What stands where a record should: its columns, or what is wrong with it."""


def located(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its ValueError with `where` in front."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def field(fields: Mapping[str, Any], column: str) -> Any:
    if column not in fields:
        raise Problem(
            "columns",
            f"no column {column!r}; the record has {', '.join(map(repr, fields)) or 'none'}",
            "set it in the record section",
        )
    return fields[column]


def text_field(fields: Mapping[str, Any], column: str) -> str:
    value = fields.get(column)
    if value.__class__ is str and value.isascii():
        return value  # as most are
    return checked_text(field(fields, column), f"column {column!r}")


def checked_text(value: object, what: str) -> str:
    """`value`, where it is text that has a UTF-8 form."""
    if not isinstance(value, str):
        raise Problem("type", f"{what} should be text, not {brief(value)}", "write it as a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Problem("unicode", f"{what} has half a surrogate pair at character {error.start}", "remove it") from error
    return value


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
