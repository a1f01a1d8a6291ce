"""Equality of JSON values, in which a truth value is no number, and 1 equals 1.0."""

from __future__ import annotations

from typing import Any


def equal(first: Any, second: Any) -> bool:
    """Return whether two JSON values are equal; the order of an object's keys does not count."""
    # Python holds True to be 1.
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
