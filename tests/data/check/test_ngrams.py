"""Words and their sequences against plain Python."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.check import ngrams
from moe_train.data.check.ngrams import first_words, grams, words


def plain_words(text: str) -> list[str]:
    """ASCII letters and digits and everything from U+0080 that is no sign; each character from U+3000 begins a word."""
    result: list[str] = []
    open_word = False
    for character in text.lower():
        code = ord(character)
        is_ascii_letter = re.match("[a-z0-9]", character) is not None
        letter = is_ascii_letter or (code >= 0xC0 and not 0x2000 <= code < 0x3000)
        if letter and open_word and code < 0x3000:
            result[-1] += character
        elif letter:
            result.append(character)
        open_word = letter
    return result


ALPHABET = "abAB09_ .,'\n\0\t\"«»üßÉé“”–東京한ｆ😀"


@given(st.lists(st.text(ALPHABET, max_size=40), max_size=6))
def test_words_are_those_of_plain_python(texts: list[str]) -> None:
    hashed = words(texts)
    expected = [plain_words(text) for text in texts]
    assert np.diff(hashed.offsets).tolist() == [len(items) for items in expected]
    flat = [word for text_words in expected for word in text_words]
    assert len(set(flat)) == len(set(hashed.hashes.tolist())) == len(set(zip(flat, hashed.hashes.tolist(), strict=True)))


@given(st.lists(st.text("ab ", max_size=30), max_size=6), st.sampled_from([1, 2, 5, 13]))
def test_grams_are_those_of_plain_python(texts: list[str], n: int) -> None:
    hashed = grams(words(texts), n)
    expected = []
    for text in texts:
        text_words = plain_words(text)
        num_grams = max(len(text_words) - n + 1, min(len(text_words), 1))
        expected.append([tuple(text_words[i : i + n]) for i in range(num_grams)])
    assert np.diff(hashed.offsets).tolist() == [len(items) for items in expected]
    flat = [gram for text_grams in expected for gram in text_grams]
    assert len(set(flat)) == len(set(hashed.hashes.tolist())) == len(set(zip(flat, hashed.hashes.tolist(), strict=True)))


HASH = "0x3b9e6f2af050c48f"


def test_hashes_are_the_same_everywhere() -> None:
    hashed = words(["The quick brown fox, 東京"])
    assert hashed.hashes.tolist() == words(["x", "THE quick; brown\tfox 東京!"]).hashes[1:].tolist()
    assert hex(int(np.bitwise_xor.reduce(grams(hashed, 3).hashes))) == HASH  # it must not change with numpy or the platform


def test_long_texts_have_the_same_words_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The quick brown fox jumps over 東京, the lazy dog. " * 3, "", "a b", "x" * 50]
    whole = words(texts)
    monkeypatch.setattr(ngrams, "_AT_ONCE", 20)
    monkeypatch.setattr(ngrams, "_LOOK_BACK", 15)
    in_parts = words(texts)
    last = len(whole.hashes) - 1
    assert in_parts.hashes[:last].tolist() == whole.hashes[:last].tolist()
    # Only the text without white space has more words in parts than it has in one.
    assert np.diff(in_parts.offsets).tolist() == [*np.diff(whole.offsets)[:-1].tolist(), 3]


def test_first_words() -> None:
    hashed = words(["a b c", "", "d", "e f"])
    assert first_words(hashed, 3) is hashed
    cut = first_words(hashed, 1)
    assert cut.hashes.tolist() == words(["a", "", "d", "e"]).hashes.tolist()
    assert cut.offsets.tolist() == [0, 1, 1, 2, 3]
