"""Bounds on what one operation of a chat template may write: a billion characters are refused before they take memory.

The child process that renders chat templates imports this file; it imports nothing else from this package.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import Any

import jinja2

_LARGEST = 1 << 20
"""Characters or items that one repetition or padding may write."""
_LARGEST_NUMBER = 1 << 16
"""Bits that a product or power may have."""
WIDEST = 1000
"""Characters to which a number or text may be padded by a format."""
SIZE_FILTERS = frozenset(["batch", "slice", "round"])
"""Filters whose numbers decide how large the result is."""
SIZED = (str, bytes, list, tuple)
"""Types of values that `+` and `*` extend."""
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?", re.DOTALL)


class TooLarge(jinja2.TemplateError):
    """An operation of the template would write more than it may."""


def check_size(size: int, largest: int) -> None:
    """Raise TooLarge if a result would exceed the largest size allowed."""
    if size > largest:
        raise TooLarge(f"one of its operations asks for {size:,} characters, and at most {largest:,} are allowed")


def check_numbers(values: Iterable[Any]) -> None:
    """Raise TooLarge if one of the values is a number beyond the largest padding."""
    for value in values:
        if isinstance(value, int):
            check_size(abs(value), _LARGEST_NUMBER)


def power(base: Any, exponent: Any) -> Any:
    """Raise a number to a power."""
    # x ** n has about n times as many bits as x.
    if isinstance(base, int) and isinstance(exponent, int):
        check_size(base.bit_length() * abs(exponent), _LARGEST_NUMBER)
    return base**exponent


def product(left: Any, right: Any) -> Any:
    """Multiply numbers, or repeat a text or list."""
    if isinstance(left, int) and isinstance(right, int):
        # A product has at most as many bits as both factors together.
        check_size(left.bit_length() + right.bit_length(), _LARGEST_NUMBER)
    for repeated, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(repeated, SIZED):
            check_size(len(repeated) * times, _LARGEST)
    return left * right


def check_percent(pattern: str | bytes) -> None:
    """Raise TooLarge if a pattern of `%` pads to a large width."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    if "%" in text:
        for widths in _PERCENT.findall(text):
            for width in widths:
                # A width that is an argument could be any number.
                check_size(WIDEST + 1 if width == "*" else _number(width), WIDEST)


def check_braces(pattern: str) -> None:
    """Raise TooLarge if a pattern of `str.format` pads to a large width, or to one that is an argument."""
    for _, _, spec, _ in string.Formatter().parse(pattern):
        for width in re.findall(r"\d+", spec or ""):
            check_size(_number(width), WIDEST)
        if "{" in (spec or ""):
            raise TooLarge("it formats to a width that is an argument, and could be any number")


def _number(digits: str) -> int:
    """Return a width; one with many digits is only known to be large."""
    return int(digits or 0) if len(digits) < 10 else 10**10


def check_filter(name: str, operands: list[Any], kwargs: dict[str, Any], largest: int) -> None:
    """Raise TooLarge if the result of a filter would be too large."""
    text = str(operands[0]) if operands[0].__class__ is not list else ""
    arguments = [*operands[1:], *kwargs.values()]
    match name:
        case "join":
            separator = max((len(str(argument)) for argument in arguments), default=0)
            sizes = [len(item) if isinstance(item, str) else len(str(item)) for item in operands[0]]
            check_size(sum(sizes) + separator * len(sizes), largest)
        case "format":
            check_percent(text)
        case "center":
            check_numbers(arguments)
        case "indent" | "wordwrap":
            check_numbers(arguments)
            width = max(map(_width, arguments), default=0)
            if width > WIDEST:
                check_size((text.count("\n") + 1) * width, _LARGEST)
        case "replace" if len(operands) > 2:
            checked_arguments(text, "replace", tuple(operands[1:3]), largest)


def _width(argument: Any) -> int:
    """Return how many characters an argument of `indent` or `wordwrap` may add to a line: a text, or a number of spaces."""
    if isinstance(argument, str):
        return len(argument)
    return int(argument or 0)


def checked_arguments(owner: Any, name: str, args: tuple[Any, ...], largest: int) -> tuple[Any, ...]:
    """Return the arguments of a method of a text. Raises TooLarge if its result would be too large."""
    if name in _PADDING:
        check_numbers(args)
        if name == "expandtabs":
            tab = "\t" if isinstance(owner, str) else b"\t"
            check_size(owner.count(tab) * (args[0] if args else 8), largest)
    elif name == "join" and args:
        # A generator could be consumed only once, so the list takes its place as the argument.
        items = list(args[0])
        check_size(sum(map(len, items)) + len(owner) * len(items), largest)
        return (items, *args[1:])
    # Counting the occurrences takes time, so only if the result could be large at all.
    elif name == "replace" and len(args) > 1 and len(owner) * len(args[1]) > _LARGEST:
        check_size(len(owner) + owner.count(args[0]) * len(args[1]), largest)
    elif name == "translate" and args and isinstance(args[0], dict):
        longest = max((len(value) for value in args[0].values() if isinstance(value, str)), default=1)
        check_size(len(owner) * longest, largest)
    return args
