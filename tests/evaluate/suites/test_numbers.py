"""Graders of numbers, on answers as models write them."""

from __future__ import annotations

import builtins

import pytest

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.numbers import check_number, number_grade


def item(*answers: str) -> SuiteItem:
    return SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "?"}], [], answers)


@pytest.mark.parametrize(
    ("grader", "expected", "answer", "score"),
    [
        (config.NumberGrader(name="number"), ["#### 1,234"], "So it costs $1234.00.", 1),
        (config.NumberGrader(name="number"), ["72"], "72 clips in April, 24 in May", 0),
        (config.NumberGrader(name="number", after="####"), ["x 1 #### 72"], "Thus #### 72 (of 100)", 0),
        (config.NumberGrader(name="number", after="####"), ["x 1 #### 72"], "12 + 60 #### 72\n", 1),
        (config.NumberGrader(name="number"), ["-3"], "The result is −3", 1),
        (config.NumberGrader(name="number"), [".5"], "0.50", 1),
        (config.NumberGrader(name="number"), ["1000000"], "1e6", 1),
        (config.NumberGrader(name="number"), ["3.14"], "3.141", 0),
        (config.NumberGrader(name="number", tolerance=0.01), ["3.14"], "3.141", 1),
        (config.NumberGrader(name="number"), ["3"], "three", 0),
    ],
)
def test_last_numbers(grader: config.NumberGrader, expected: list[str], answer: str, score: float) -> None:
    check_number(item(*expected), grader)
    assert number_grade(grader)(item(*expected), answer) == score


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ("\\frac{1}{2}", "It is $\\frac12$.", 1),
        ("1/2", "0.5", 1),
        ("x 1 #### 72", "12 + 60 #### 72", 1),
        ("\\sqrt{2}", "\\boxed{\\sqrt 3}", 0),
        ("3", "three", 0),
    ],
)
def test_latex(expected: str, answer: str, score: float) -> None:
    pytest.importorskip("math_verify", reason="the extra eval is not installed")
    assert number_grade(config.NumberGrader(name="number", latex=True, after="####"))(item(expected), answer) == score


def test_latex_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = builtins.__import__

    def without(name: str, *more: object) -> object:
        if name == "math_verify":
            raise ImportError("No module named 'math_verify'")
        return actual(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs math-verify, which is not installed .*launch/install.sh eval"):
        number_grade(config.NumberGrader(name="number", latex=True))


def test_latex_that_would_be_read_as_a_number() -> None:
    with pytest.raises(ValueError, match=r"items.jsonl:1: .* is LaTeX, .* set grader.latex"):
        check_number(item("\\frac{1}{2}"), config.NumberGrader(name="number"))
