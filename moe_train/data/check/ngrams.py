"""Hash every sequence of n consecutive words, for many texts at once.

Words are runs of letters and digits, in lower case; each Chinese, Japanese or Korean character is a word of its own.
Punctuation and white space are ignored. The hashes depend only on the text, not on the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_LETTERS = np.zeros(256, bool)  # bytes of UTF-8 in words: ASCII letters and digits, and all bytes of non-ASCII characters
_LETTERS[[*range(48, 58), *range(65, 91), *range(97, 123), *range(128, 256)]] = True
_PUNCTUATION = {0xC2: 2, 0xE2: 3}  # first bytes of U+0080 to U+00BF and U+2000 to U+2FFF, mostly signs -> bytes of such a character
_IDEOGRAPH = 0xE3  # first bytes from here on begin characters from U+3000
_LONGEST = 32  # bytes of a word that are hashed, along with its length
_AT_ONCE = 1 << 20  # characters of a text whose words are found at once
_LOOK_BACK = 1 << 10  # characters within which white space is looked for
# 2**64 over the golden ratio. It is odd, so multiplication by it modulo 2**64 loses no bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Words(NamedTuple):
    """Hashes of the words of T texts: text t has `hashes[offsets[t]:offsets[t + 1]]`; uint64, int64."""

    hashes: np.ndarray
    offsets: np.ndarray


class Grams(NamedTuple):
    """Hashes of the n-grams of T texts: text t has `hashes[offsets[t]:offsets[t + 1]]`; uint64, int64."""

    hashes: np.ndarray
    offsets: np.ndarray


def words(texts: Sequence[str]) -> Words:
    """Split texts into words, and hash each word.

    Memory is bounded for texts of any length. A word across the end of a part of a long text without white space counts as two.
    """
    if all(len(text) <= _AT_ONCE for text in texts):
        return _words(texts)
    parts: list[Words] = []
    counts: list[int] = []
    for text in texts:
        of_text = [_words([part]) for part in _parts(text)]
        parts += of_text
        counts.append(sum(len(part.hashes) for part in of_text))
    return Words(np.concatenate([part.hashes for part in parts]), np.concatenate(([0], np.cumsum(counts))))


def first_words(text_words: Words, limit: int) -> Words:
    """Return the words of each text, of those with more than `limit` words only the first ones."""
    hashes, offsets = text_words
    if not len(hashes) or np.diff(offsets).max() <= limit:
        return text_words
    parts = [hashes[start : min(stop, start + limit)] for start, stop in itertools.pairwise(offsets)]
    return Words(np.concatenate(parts), np.concatenate(([0], np.cumsum([len(part) for part in parts]))))


def _parts(text: str) -> Iterator[str]:
    """Yield parts of a text that end at white space where there is any, and have at most `_AT_ONCE` characters."""
    start = 0
    while len(text) - start > _AT_ONCE:
        stop = start + _AT_ONCE
        space = text.rfind(" ", stop - _LOOK_BACK, stop)
        stop = stop if space < 0 else space
        yield text[start:stop]
        start = stop
    yield text[start:]


def _words(texts: Sequence[str]) -> Words:
    """Split texts into words, all at once."""
    parts = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    data = np.frombuffer(b" ".join([b"", *parts, b""]), np.uint8)  # each text has a space on both sides
    begins = np.cumsum([1, *(len(part) + 1 for part in parts)])
    letters = _LETTERS[data]
    for byte, length in _PUNCTUATION.items():
        signs = np.flatnonzero(data == byte)
        for k in range(length):
            letters[signs + k] = False
    before = letters[:-1]
    first = letters[1:] & (~before | (data[1:] >= _IDEOGRAPH))  # element i describes byte i + 1
    starts = np.flatnonzero(first) + 1
    # A word ends before a byte of no word, and before an ideograph, which begins another word.
    ends = np.flatnonzero(before & (~letters[1:] | first)) + 1
    lengths = ends - starts
    hashes = mixed(lengths.astype(np.uint64))
    alive = np.arange(len(starts))
    # Hash one byte of every word at a time; only words that are longer than k take part.
    for k in range(_LONGEST):
        alive = alive[lengths[alive] > k]
        if not len(alive):
            break
        hashes[alive] = (hashes[alive] ^ data[starts[alive] + k]) * _MULTIPLIER
        hashes[alive] ^= hashes[alive] >> np.uint64(29)
    return Words(mixed(hashes), np.searchsorted(starts, begins))


def grams(word_hashes: Words, n: int) -> Grams:
    """Hash each sequence of n consecutive words; a text with fewer words, but at least one, gives one hash of all its words."""
    hashes, offsets = word_hashes
    counts = np.diff(offsets)
    text_ends = np.repeat(offsets[1:], counts)
    text_starts = np.repeat(offsets[:-1], counts)
    starts = np.arange(len(hashes))
    starts = starts[(starts + n <= text_ends) | ((starts == text_starts) & (text_ends - text_starts < n))]
    stop = text_ends[starts]
    total = np.zeros(len(starts), np.uint64)
    for k in range(n):
        inside = starts + k < stop
        # Before each word, so that the hash depends on the order of the words.
        total *= _MULTIPLIER
        # Only texts of fewer than n words have positions outside; without them the mask is not needed.
        total[inside] += hashes[starts[inside] + k] if not inside.all() else hashes[starts + k]
    per_text = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    return Grams(mixed(total), np.concatenate(([0], np.cumsum(per_text))))


def mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values: a bijection in which every output bit depends on every input bit (SplitMix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
