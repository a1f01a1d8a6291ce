"""What is in a record, checked; the caller knows where the record stands, and `located` says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def located(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its ValueError with `where` in front."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def field(fields: dict[str, Any], column: str) -> Any:
    if column not in fields:
        raise ValueError(
            f"no column {column!r}; the record has {', '.join(map(repr, fields)) or 'none'}: set it in the record section"
        )
    return fields[column]


def text_field(fields: dict[str, Any], column: str) -> str:
    return checked_text(field(fields, column), f"column {column!r}")


def checked_text(value: object, what: str) -> str:
    """`value`, where it is text that has a UTF-8 form."""
    if not isinstance(value, str):
        raise ValueError(f"{what} should be text, not {brief(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} has half a surrogate pair at character {error.start}; remove it") from error
    return value


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
