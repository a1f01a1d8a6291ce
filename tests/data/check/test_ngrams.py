"""Words and their sequences against plain Python."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.check.ngrams import grams, words


def plain_words(text: str) -> list[str]:
    """ASCII letters and digits and everything from U+0080 that is no sign; each character from U+3000 begins a word."""
    found: list[str] = []
    open_word = False
    for character in text.lower():
        code = ord(character)
        letter = re.match("[a-z0-9]", character) if code < 0x80 else code >= 0xC0 and not 0x2000 <= code < 0x3000
        if letter and open_word and code < 0x3000:
            found[-1] += character
        elif letter:
            found.append(character)
        open_word = bool(letter)
    return found


ALPHABET = "abAB09_ .,'\n\0\t\"«»üßÉé“”–東京한ｆ😀"


@given(st.lists(st.text(ALPHABET, max_size=40), max_size=6))
def test_words_are_those_of_plain_python(texts: list[str]) -> None:
    found = words(texts)
    expected = [plain_words(text) for text in texts]
    assert np.diff(found.offsets).tolist() == [len(one) for one in expected]
    flat = [word for one in expected for word in one]
    assert len(set(flat)) == len(set(found.hashes.tolist())) == len(set(zip(flat, found.hashes.tolist(), strict=True)))


@given(st.lists(st.text("ab ", max_size=30), max_size=6), st.sampled_from([1, 2, 5, 13]))
def test_grams_are_those_of_plain_python(texts: list[str], n: int) -> None:
    found = grams(words(texts), n)
    expected = []
    for text in texts:
        one = plain_words(text)
        expected.append([tuple(one[i : i + n]) for i in range(max(len(one) - n + 1, min(len(one), 1)))])
    assert np.diff(found.offsets).tolist() == [len(one) for one in expected]
    flat = [gram for one in expected for gram in one]
    assert len(set(flat)) == len(set(found.hashes.tolist())) == len(set(zip(flat, found.hashes.tolist(), strict=True)))


HASH = "0x3b9e6f2af050c48f"


def test_hashes_are_the_same_everywhere() -> None:
    found = words(["The quick brown fox, 東京"])
    assert found.hashes.tolist() == words(["x", "THE quick; brown\tfox 東京!"]).hashes[1:].tolist()
    assert hex(int(np.bitwise_xor.reduce(grams(found, 3).hashes))) == HASH  # it must not change with numpy or the platform
