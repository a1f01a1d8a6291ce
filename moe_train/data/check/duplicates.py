"""Find duplicate records in a corpus, exact or near (MinHash with LSH), in constant memory.

Two records with the same pictures and sound, if any, are near duplicates if the sets of their 5-word sequences (`ngrams`) have a
Jaccard similarity of at least 0.8, estimated from 128 minima (Broder 1997; standard error 0.035 at 0.8) over the first 2^20 words
of each. Candidates share one of 16 bands of 8 minima: this finds 95% of the pairs at 0.8 and all but one in 10^4 at 0.9, and
compares 6% of the pairs at 0.5. Fingerprints (0.35 KB a record) are on disk, and are sorted in parts.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.check.ngrams import Words, first_words, grams, mixed

WORDS = 5
SIMILAR = 0.8
_BANDS = 16
_ROWS = 8
_MINIMA = _BANDS * _ROWS
# The k-th hash function is (x ^ mask) * factor modulo 2**64: a bijection, as the factor is odd, so distinct n-grams stay distinct.
_FACTORS = mixed(np.arange(1, _MINIMA + 1, dtype=np.uint64)) | np.uint64(1)
_MASKS = mixed(np.arange(1000, 1000 + _MINIMA, dtype=np.uint64))
_MOST_WORDS = 1 << 20  # words of a record that decide its similarity: 128 minima of all words of a book would take seconds
_AT_ONCE = 1 << 20  # records sorted at once
_COMPARED = 1 << 7  # pairs compared at once: each loads up to 128 KiB of the file


class Fingerprints(NamedTuple):
    """The fingerprints of n records, m of which contain words."""

    records: np.ndarray
    """(n,) uint64: hash of the complete record."""
    with_words: np.ndarray
    """(m,) indices, among the n, of the records with words."""
    bands: np.ndarray
    """(m, 16) uint32: hash of each band."""
    minima: np.ndarray
    """(m, 128) uint16: the upper 16 bits of each minimum."""


def fingerprints(contents: Sequence[str], words: Words, media: np.ndarray | None = None) -> Fingerprints:
    """Compute the fingerprints of records.

    Args:
        contents: For each record, a text that is equal only for exact duplicates.
        words: The words that decide similarity.
        media: (n,) uint64, a hash of the pictures and the sound of each record, 0 without any; records with others are never near
            duplicates. None if no record has any.
    """
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in contents)
    hashes, offsets = grams(first_words(words, _MOST_WORDS), WORDS)
    if media is not None and media.any():
        # No sequence of words equals one about other pictures or sound.
        of_gram = np.repeat(media, np.diff(offsets))
        hashes = np.where(of_gram > 0, mixed(hashes ^ mixed(of_gram)), hashes)
    # `reduceat` has no result for an empty part: it would give the first hash of the next text instead.
    with_words = np.flatnonzero(np.diff(offsets))
    starts = offsets[with_words]
    minima = np.empty((len(with_words), _MINIMA), np.uint64)
    if len(with_words):
        for k in range(_MINIMA):
            minima[:, k] = np.minimum.reduceat((hashes ^ _MASKS[k]) * _FACTORS[k], starts)
    # The minimum of many hashes is small, so its upper bits are nearly constant until they are mixed.
    minima = mixed(minima)
    bands = np.zeros((len(with_words), _BANDS), np.uint64)
    for row in range(_ROWS):
        # (m, 16): column b is minimum `row` of band b, which has the minima from 8 b to 8 b + 7.
        bands = mixed(bands + minima[:, row::_ROWS])
    # The truncated hashes match by chance in few pairs; those of bands are only candidates, and 128 minima are averaged.
    return Fingerprints(
        np.frombuffer(digests, np.uint64), with_words, bands.astype(np.uint32), (minima >> np.uint64(48)).astype(np.uint16)
    )


class Twin(NamedTuple):
    """A record that duplicates an earlier one."""

    record: int
    """Index of the record."""
    earlier: int
    """Index of the earlier record."""
    similarity: float
    """Estimated Jaccard similarity; 1 for an exact duplicate."""


class Duplicates(NamedTuple):
    """The duplicates in a corpus."""

    exact: int
    """Number of records that equal an earlier one."""
    near: int
    """Number of further records that are similar to an earlier one."""
    examples: list[Twin]
    """Some of them, exact ones first."""


class Spool:
    """The fingerprints of a corpus, in files of `directory`, in the order of the records.

    Each band is in a file of its own, so that only one band at a time is in memory.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = {name: directory / name for name in ("records", "with_words", "minima", *map(str, range(_BANDS)))}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self.num_records = 0

    def add(self, prints: Fingerprints) -> None:
        """Append the fingerprints of the next records."""
        arrays = {"records": prints.records, "with_words": prints.with_words + self.num_records, "minima": prints.minima}
        arrays |= {str(band): keys for band, keys in enumerate(prints.bands.T)}
        for name, array in arrays.items():
            self._files[name].write(array.tobytes())
        self.num_records += len(prints.records)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def duplicates(self, num_examples: int = 5) -> Duplicates:
        """Find the duplicates. This closes the files, so nothing can be added afterwards."""
        self.close()
        if not self.num_records:
            return Duplicates(0, 0, [])
        is_exact, exact_twins = self._exact(num_examples)
        # A file without content cannot be mapped into memory.
        if not self._paths["with_words"].stat().st_size:
            return Duplicates(int(is_exact.sum()), 0, exact_twins)
        num_near, near_twins = self._near(is_exact, num_examples)
        return Duplicates(int(is_exact.sum()), num_near, exact_twins + near_twins)

    def _exact(self, num_examples: int) -> tuple[np.ndarray, list[Twin]]:
        """Find the exact duplicates: which records are one (bool), and the first of them."""
        record_hashes = np.memmap(self._paths["records"], np.uint64, "r")
        is_exact = np.zeros(self.num_records, bool)
        examples: list[Twin] = []
        for first, later in _alike(record_hashes):
            new = ~is_exact[later]
            first = first[new]
            later = later[new]
            is_exact[later] = True
            examples += [Twin(int(a), int(b), 1.0) for a, b in zip(later[:num_examples], first[:num_examples], strict=True)]
        return is_exact, sorted(examples)[:num_examples]

    def _near(self, is_exact: np.ndarray, num_examples: int) -> tuple[int, list[Twin]]:
        """Find the near duplicates among records that are no exact ones: their number, and some of them."""
        record = np.memmap(self._paths["with_words"], np.int64, "r")
        with self._paths["minima"].open("rb") as stream:
            # Not np.memmap, which has no `madvise`.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        minima = np.frombuffer(mapped, np.uint16).reshape(-1, _MINIMA)
        is_near = np.zeros(self.num_records, bool)
        examples: list[Twin] = []
        for band in range(_BANDS):
            for first, later in _alike(np.memmap(self._paths[str(band)], np.uint32, "r")):
                new = ~(is_exact[record[later]] | is_near[record[later]])
                first = first[new]
                later = later[new]
                for start in range(0, len(first), _COMPARED):
                    a = first[start : start + _COMPARED]
                    b = later[start : start + _COMPARED]
                    mapped.madvise(mmap.MADV_DONTNEED)  # release the pages of earlier pairs
                    # A shared band makes a pair a candidate; all minima together estimate how similar it is.
                    similarity = (minima[a] == minima[b]).mean(1)
                    is_similar = similarity >= SIMILAR
                    is_near[record[b[is_similar]]] = True
                    num_missing = max(0, num_examples - len(examples))
                    pairs = zip(
                        record[b[is_similar]][:num_missing],
                        record[a[is_similar]][:num_missing],
                        similarity[is_similar][:num_missing],
                        strict=True,
                    )
                    examples += [Twin(int(x), int(y), float(s)) for x, y, s in pairs]
        return int(is_near.sum()), sorted(examples)


def _alike(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (earlier, later) indices of equal keys.

    Each later index comes with the first index of its key, and then with the one right before it.
    """
    # Each part holds the keys with one remainder, so equal keys meet in the same part and one part at a time is sorted.
    parts = -(-len(keys) // _AT_ONCE)
    for part in range(parts):
        indices = []
        for start in range(0, len(keys), _AT_ONCE):
            block = np.asarray(keys[start : start + _AT_ONCE])
            indices.append(np.flatnonzero(block % block.dtype.type(parts) == part) + start)
        places = np.concatenate(indices)
        # Stable, so that equal keys stay in the order of the records.
        places = places[np.argsort(keys[places], kind="stable")]
        ordered = keys[places]
        repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(places)), 0))
        yield places[first[repeats]], places[repeats]
        yield places[repeats - 1], places[repeats]
