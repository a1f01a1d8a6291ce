"""Records that are alike: fingerprints against exact Jaccard similarity, exact and near duplicates."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.check import duplicates
from moe_train.data.check.duplicates import Fingerprints, Spool, fingerprints
from moe_train.data.check.ngrams import grams, words

VOCABULARY = [f"word{i}" for i in range(2000)]


def prints(texts: list[str]) -> Fingerprints:
    return fingerprints(texts, words(texts))


def spooled(directory: Path, texts: list[str], step: int = 7) -> Spool:
    directory.mkdir(exist_ok=True)
    spool = Spool(directory)
    for start in range(0, len(texts), step):
        spool.add(prints(texts[start : start + step]))
    return spool


def jaccard(one: str, two: str) -> float:
    a, b = (set(grams(words([text]), duplicates.WORDS).hashes.tolist()) for text in (one, two))
    return len(a & b) / len(a | b)


def variants(random_: random.Random, changed: int) -> tuple[str, str]:
    text = random_.choices(VOCABULARY, k=300)
    changed_text = text.copy()
    for i in random_.sample(range(300), changed):
        changed_text[i] = "changed"
    return " ".join(text), " ".join(changed_text)


def test_minima_estimate_jaccard() -> None:
    random_ = random.Random(0)
    errors = []
    for changed in (0, 1, 3, 6, 12, 25, 50, 100):
        for _ in range(25):
            one, two = variants(random_, changed)
            minima = prints([one, two]).minima
            errors.append((minima[0] == minima[1]).mean() - jaccard(one, two))
    assert max(map(abs, errors)) < 0.16  # 4 standard errors
    assert abs(np.mean(errors)) < 0.01  # no bias


@pytest.mark.parametrize("at_once", [16, 1 << 20])
def test_duplicates_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(duplicates, "_AT_ONCE", at_once)
    random_ = random.Random(1)
    texts: list[str] = []
    truth: list[tuple[int, int, float]] = []  # (index of the first of two, words changed, similarity)
    for changed in [*[0] * 10, *[1] * 40, *[2] * 40, *[40] * 40]:
        one, two = variants(random_, changed)
        truth.append((len(texts), changed, jaccard(one, two)))
        texts += [one, two]
    texts += ["", "  ", "a", "b"]
    result = spooled(tmp_path, texts).duplicates(num_examples=1000)
    exact = {
        twin.record: twin.earlier for twin in result.examples if twin.similarity == 1 and texts[twin.record] == texts[twin.earlier]
    }
    near = {twin.record: twin.earlier for twin in result.examples if twin.record not in exact}
    assert exact == {first + 1: first for first, changed, _ in truth if changed == 0} and result.exact == 10
    assert result.near == len(near)
    surely = {first + 1: first for first, changed, similarity in truth if changed and similarity > 0.92}
    assert len(surely) >= 60 and surely.items() <= near.items()
    assert not {first + 1 for first, _, similarity in truth if similarity < 0.65} & near.keys()


def test_the_same_with_other_cuts(tmp_path: Path) -> None:
    random_ = random.Random(2)
    texts = [text for changed in [0, 1, 2, 4, 8] * 10 for text in variants(random_, changed)]
    random_.shuffle(texts)
    result = [spooled(tmp_path / str(step), texts, step).duplicates() for step in (1, 13, 1000)]
    assert result[0] == result[1] == result[2]
    assert result[0].exact == 10 and result[0].near >= 20


def test_punctuation_and_case_make_near_duplicates(tmp_path: Path) -> None:
    result = spooled(tmp_path, ["The answer, of course, is 5.", "the answer of course is 5", "The answer is 5."]).duplicates()
    assert (result.exact, result.near) == (0, 1)
    assert result.examples == [(1, 0, 1.0)]


def test_no_records(tmp_path: Path) -> None:
    assert spooled(tmp_path, []).duplicates() == (0, 0, [])
    assert spooled(tmp_path / "empty", ["", ""]).duplicates() == (1, 0, [(1, 0, 1.0)])
