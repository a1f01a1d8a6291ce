"""One check of a proof: what it established, what it did not examine and why, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

MetricValue: TypeAlias = "bool | int | float | str | Sequence[MetricValue] | Mapping[str, MetricValue] | None"
"""A metric of a check, as JSON expresses it."""
ProofRecord = dict[str, Any]
"""The record of a proof, as it is written to and read from JSON."""


class Finding(NamedTuple):
    """What a check that passed has established."""

    summary: str
    """One line for people."""
    metrics: Mapping[str, MetricValue] = {}


class Fault(ValueError):
    """A check failed; the message states what is wrong."""


class NotChecked(Exception):
    """Raised by a check that does not apply or cannot be made with what is available, with the reason."""


class Check(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool | None
    """None if it was not checked."""
    summary: str
    """One line for people: what was established, the fault, or why it was not checked."""
    metrics: Mapping[str, MetricValue]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the check as the record and `verify --json` state it; the keys are part of the file format."""
        return {
            "name": self.name,
            "passed": self.passed,
            "said": self.summary,
            "figures": self.metrics,
            "seconds": self.seconds,
        }


def run(name: str, check: Callable[[], Finding]) -> Check:
    """Run a check and record its result.

    Args:
        name: the name in the record.
        check: returns what it established, or raises Fault (or what damaged files raise) or NotChecked.
    """
    start = time.perf_counter()
    passed: bool | None = True
    try:
        finding = check()
    except NotChecked as reason:
        passed = None
        finding = Finding(str(reason))
    except (ValueError, OSError) as fault:
        passed = False
        finding = Finding(str(fault))
    return Check(name, passed, finding.summary, finding.metrics, time.perf_counter() - start)


def require(checks: Iterable[Check]) -> None:
    """Raise RuntimeError with a one-line message if a check failed."""
    failed = [check for check in checks if check.passed is False]
    if failed:
        names = ", ".join(check.name for check in failed)
        raise RuntimeError(f"the proof failed ({names}): {failed[0].summary}")


def first_and_count(faults: Sequence[str]) -> str:
    """Return the first of several faults, followed by the number of others."""
    if len(faults) == 1:
        return faults[0]
    return f"{faults[0]} (and {len(faults) - 1} more)"
