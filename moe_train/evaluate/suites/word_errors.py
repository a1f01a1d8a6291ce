"""The grader of transcripts: the word error rate, an edit distance over words."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem


class WordErrors(NamedTuple):
    """How a transcript differs from the expected one."""

    errors: int
    """Least number of words to substitute, delete or insert."""
    words: int
    """Words of the expected transcript."""

    @property
    def rate(self) -> float:
        """The word error rate, which exceeds 1 where many words are inserted."""
        return self.errors / self.words


def word_error_grade(grader: config.WordErrorRateGrader) -> Callable[[SuiteItem, str], float]:
    """Return the function that grades by this section."""

    def grade(item: SuiteItem, answer: str) -> float:
        return max(0.0, 1.0 - word_errors(grader, item, answer).rate)

    return grade


def check_words(item: SuiteItem, grader: config.WordErrorRateGrader) -> None:
    """Raise ValueError if an expected answer has no words to compare with."""
    for expected in item.answers:
        if not _words(expected, grader):
            raise ValueError(
                f"{item.location}: the expected answer {expected[:40]!r} has no words, so there is no rate; remove the item"
            )


def word_errors(grader: config.WordErrorRateGrader, item: SuiteItem, answer: str) -> WordErrors:
    """Compare an answer with the expected one that it differs from least, relative to its length."""
    given = _words(answer, grader)
    compared = []
    for expected in item.answers:
        words = _words(expected, grader)
        compared.append(WordErrors(edit_distance(words, given), len(words)))
    return min(compared, key=lambda found: found.rate)


def edit_distance(expected: Sequence[str], given: Sequence[str]) -> int:
    """Return the least number of substitutions, deletions and insertions that turn one sequence into the other (Levenshtein)."""
    distances = list(range(len(given) + 1))  # from no expected word to each beginning of those given
    for i, word in enumerate(expected, start=1):
        diagonal = distances[0]
        distances[0] = i
        for j, other in enumerate(given, start=1):
            substituted = diagonal + (word != other)
            diagonal = distances[j]
            distances[j] = min(substituted, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def _words(text: str, grader: config.WordErrorRateGrader) -> list[str]:
    """Return the words of a text: what white space separates."""
    if grader.ignore_case:
        text = text.casefold()
    if grader.ignore_punctuation:
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    return text.split()
