"""One check of a proof: what it found, what it did not examine and why, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Found = tuple[str, Mapping[str, Any]]
"""A one-line summary for people, and its figures."""


class Fault(ValueError):
    """Something is not as it has to be."""


class NotChecked(Exception):
    """Raised by a check that does not apply or cannot be done here, with the reason."""


class Check(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool | None
    """None if it was not checked."""
    said: str
    """One line for people: what was found, the fault, or why it was not checked."""
    figures: Mapping[str, Any]
    seconds: float


def run(name: str, check: Callable[[], Found]) -> Check:
    """Run a check and record its result.

    Args:
        name: the name in the record.
        check: returns what it found, or raises Fault (or what damaged files raise) or NotChecked.
    """
    start = time.perf_counter()
    passed: bool | None = True
    try:
        summary, figures = check()
    except NotChecked as reason:
        passed = None
        summary = str(reason)
        figures = {}
    except (ValueError, OSError) as fault:
        passed = False
        summary = str(fault)
        figures = {}
    return Check(name, passed, summary, figures, time.perf_counter() - start)


def require(checks: Iterable[Check]) -> None:
    """Raise RuntimeError with a one-line message if a check failed."""
    if failed := [check for check in checks if check.passed is False]:
        names = ", ".join(check.name for check in failed)
        raise RuntimeError(f"the proof failed ({names}): {failed[0].said}")
