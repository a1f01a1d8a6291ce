"""Graders of numbers: the last number of an answer, or mathematics in LaTeX by math-verify (extra `eval`)."""

from __future__ import annotations

import re
from collections.abc import Callable

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem

_NUMBER = re.compile(r"[-+−]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|[-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+")
"""A number with or without thousands separators; the minus sign may be Unicode's."""


def number_grade(grader: config.NumberGrader) -> Callable[[SuiteItem, str], float]:
    """Return the function that grades by this section.

    Raises:
        ValueError: The section asks for LaTeX, and math-verify is not installed.
    """
    if grader.latex:
        return _latex_grade(grader)

    def grade(item: SuiteItem, answer: str) -> float:
        value = last_number(answer, grader.after)
        if value is None:
            return 0.0
        for text in item.answers:
            expected = last_number(text, grader.after)
            if expected is not None and abs(value - expected) <= grader.tolerance * abs(expected):
                return 1.0
        return 0.0

    return grade


def check_number(item: SuiteItem, grader: config.NumberGrader) -> None:
    """Raise ValueError if an expected answer has nothing to compare with."""
    if grader.latex:
        return  # any expression will do
    for answer in item.answers:
        if last_number(answer, grader.after) is None:
            raise ValueError(f"{item.location}: the expected answer {answer[-40:]!r} has no number; use another grader")
        if "\\" in _relevant(answer, grader.after):
            raise ValueError(
                f"{item.location}: the expected answer {answer[-40:]!r} is LaTeX, whose last number means little; set grader.latex "
                "to true, for which the extra eval is needed"
            )


def last_number(text: str, after: str | None) -> float | None:
    """Return the last number of a text, or of what follows the last `after` in it; None if there is none."""
    numbers = _NUMBER.findall(_relevant(text, after))
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def _relevant(text: str, after: str | None) -> str:
    return text.rpartition(after)[2] if after is not None and after in text else text


def _latex_grade(grader: config.NumberGrader) -> Callable[[SuiteItem, str], float]:
    """Return the function that compares expressions with math-verify."""
    try:
        # Imported here, since only this grader needs the extra, and sympy takes a second to import.
        import math_verify
    except ImportError as error:
        raise ValueError(
            f"grader number with latex needs math-verify, which is not installed ({error}); run bash launch/install.sh eval, or "
            "leave latex out to compare the last numbers"
        ) from error

    def grade(item: SuiteItem, answer: str) -> float:
        made = math_verify.parse(_relevant(answer, grader.after))
        for text in item.answers:
            expression = _relevant(text, grader.after).strip()
            # An expected answer is often an expression without dollars, which would be read as plain text.
            expected = math_verify.parse(expression if "$" in expression else f"${expression}$")
            if math_verify.verify(expected, made):
                return 1.0
        return 0.0

    return grade
