"""Texts that are the same in each process: a chat template prints data, and no object with an address.

The child process that renders chat templates imports this file; it imports only `template_bounds` from this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2.runtime import Undefined

from moe_train.data.chat.template_bounds import check_filter, check_numbers

TEXT_FILTERS = frozenset(
    "capitalize center e escape filesizeformat forceescape format indent join lower pprint replace safe string striptags title "
    "trim truncate upper urlencode urlize wordcount wordwrap xmlattr".split()
)
"""Filters that convert their operand to text."""
_SCALARS = (str, int, float, bytes, type(None), range)
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))


class Unstable(jinja2.TemplateError):
    """The template would write a text that is another one in each process."""


def plain_data(value: Any) -> Any:
    """Return the value if it is data, whose text is the same in each process. Raises Unstable otherwise."""
    if not _is_plain(value):
        raise Unstable(f"it prints an object of type {type(value).__name__}, whose text is no part of the record and changes")
    return value


def _is_plain(value: Any) -> bool:
    """Return whether a value and all that it contains are data."""
    if isinstance(value, _SCALARS):
        return True
    if isinstance(value, Undefined):
        return value._undefined_exception is jinja2.UndefinedError  # and no access that the sandbox denies
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    # Sets are missing from the containers on purpose: the order of their items is not fixed.
    return isinstance(value, _CONTAINERS) and all(map(_is_plain, list(value)))


def checked_filter(name: str, function: Callable[..., Any], largest: int) -> Callable[..., Any]:
    """Return a filter that accepts only data, and writes no more than it may."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes before the operand

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        operands = list(args[leading:])
        if operands and name == "join":
            # The check would consume a generator, and leave nothing for the filter to join.
            operands[0] = list(operands[0])
        plain_data(operands)
        plain_data(kwargs)
        if operands:
            check_filter(name, operands, kwargs, largest)
        return function(*args[:leading], *operands, **kwargs)

    return checked


def bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose numbers are not too large."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check_numbers([*args[1:], *kwargs.values()])
        return function(*args, **kwargs)

    return bounded
