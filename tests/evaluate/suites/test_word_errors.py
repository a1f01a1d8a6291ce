"""The word error rate against an exhaustive reference, and jiwer where it is installed."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.word_errors import WordErrors, check_words, edit_distance, word_error_grade, word_errors

PLAIN = config.WordErrorRateGrader(name="word_error_rate")
FOLDED = config.WordErrorRateGrader(name="word_error_rate", ignore_case=True, ignore_punctuation=True)


def item(*answers: str) -> SuiteItem:
    return SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "?"}], [], answers)


def reference(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The recursive definition."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]), distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def random_words(draw: np.random.Generator) -> tuple[str, ...]:
    return tuple(draw.choice(["a", "b", "c"], draw.integers(0, 8)))


def test_distances_equal_the_recursive_definition() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        a, b = random_words(draw), random_words(draw)
        assert edit_distance(a, b) == reference(a, b)


@pytest.mark.parametrize(
    ("grader", "expected", "answer", "errors"),
    [
        (PLAIN, ["the cat sat"], " the  cat\nsat ", WordErrors(0, 3)),
        (PLAIN, ["the cat sat"], "The cat sat.", WordErrors(2, 3)),
        (FOLDED, ["the cat sat"], "The cat, sat.", WordErrors(0, 3)),
        (PLAIN, ["the cat sat"], "", WordErrors(3, 3)),
        (PLAIN, ["cat"], "the cat sat down here", WordErrors(4, 1)),
        (PLAIN, ["one two", "the cat sat"], "a cat sat", WordErrors(1, 3)),
    ],
)
def test_errors_and_scores(grader: config.WordErrorRateGrader, expected: list[str], answer: str, errors: WordErrors) -> None:
    assert word_errors(grader, item(*expected), answer) == errors
    assert word_error_grade(grader)(item(*expected), answer) == max(0.0, 1 - errors.errors / errors.words)


def test_expected_answers_have_words() -> None:
    check_words(item("a"), FOLDED)
    with pytest.raises(ValueError, match=r"items.jsonl:1: the expected answer '\.\.\.' has no words"):
        check_words(item("..."), FOLDED)


def test_rates_equal_those_of_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    draw = np.random.default_rng(1)
    for _ in range(100):
        expected, given = " ".join(random_words(draw) or ("a",)), " ".join(random_words(draw))
        assert word_errors(PLAIN, item(expected), given).rate == pytest.approx(jiwer.wer(expected, given))
