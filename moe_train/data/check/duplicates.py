"""Records that stand in a corpus twice: exactly, or nearly (MinHash with LSH), in flat memory.

Near means that the sets of 5-word sequences (`ngrams`) of two records have a Jaccard similarity of at least 0.8, estimated
from 128 minima (Broder 1997; standard error 0.035 at 0.8). Candidates share one of 16 bands of 8 minima: of pairs at 0.8
that finds 95%, at 0.9 all but one in 10^4, at 0.5 it compares 6%. Fingerprints (0.35 KB a record) lie on disk, and are
sorted by parts.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.check.ngrams import Words, grams, mixed

WORDS, SIMILAR = 5, 0.8
_BANDS, _ROWS = 16, 8
_MINIMA = _BANDS * _ROWS
_FACTORS = mixed(np.arange(1, _MINIMA + 1, dtype=np.uint64)) | np.uint64(1)
_MASKS = mixed(np.arange(1000, 1000 + _MINIMA, dtype=np.uint64))
_AT_ONCE = 1 << 20  # records sorted at once
_COMPARED = 1 << 7  # pairs compared at once: each brings in up to 128 KiB


class Fingerprints(NamedTuple):
    """Of n records, m of which have words: whole (n,) uint64; with_words (m,) which of the n they are; bands (m, 16)
    uint32; minima (m, 128) uint16, of each minimum the bits that say most."""

    whole: np.ndarray
    with_words: np.ndarray
    bands: np.ndarray
    minima: np.ndarray


def fingerprints(contents: Sequence[str], words: Words) -> Fingerprints:
    """contents: what makes two records the same; words: of what makes them similar."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in contents)
    hashes, offsets = grams(words, WORDS)
    with_words = np.flatnonzero(np.diff(offsets))
    starts = offsets[with_words]
    minima = np.empty((len(with_words), _MINIMA), np.uint64)
    if len(with_words):
        for k in range(_MINIMA):
            minima[:, k] = np.minimum.reduceat((hashes ^ _MASKS[k]) * _FACTORS[k], starts)
    minima = mixed(minima)
    bands = np.zeros((len(with_words), _BANDS), np.uint64)
    for row in range(_ROWS):
        bands = mixed(bands + minima[:, row::_ROWS])
    return Fingerprints(
        np.frombuffer(digests, np.uint64), with_words, bands.astype(np.uint32), (minima >> np.uint64(48)).astype(np.uint16)
    )


class Twin(NamedTuple):
    """A record, an earlier one like it, and how like."""

    record: int
    earlier: int
    similarity: float


class Duplicates(NamedTuple):
    """exact, near: records that are like an earlier one; examples: some of them, exact ones first."""

    exact: int
    near: int
    examples: list[Twin]


class Spool:
    """The fingerprints of a corpus, in files of `directory`, in the order of the records; each band in a file of its own, so
    that one at a time is in memory."""

    def __init__(self, directory: Path) -> None:
        self._paths = {name: directory / name for name in ("whole", "with_words", "minima", *map(str, range(_BANDS)))}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self.num_records = 0

    def add(self, found: Fingerprints) -> None:
        arrays = {"whole": found.whole, "with_words": found.with_words + self.num_records, "minima": found.minima}
        for name, array in (arrays | {str(band): keys for band, keys in enumerate(found.bands.T)}).items():
            self._files[name].write(array.tobytes())
        self.num_records += len(found.whole)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def duplicates(self, num_examples: int = 5) -> Duplicates:
        """Closes the files: nothing can be added after it."""
        self.close()
        if not self.num_records:
            return Duplicates(0, 0, [])
        whole = np.memmap(self._paths["whole"], np.uint64, "r")
        is_exact = np.zeros(self.num_records, bool)
        examples: list[Twin] = []
        for first, later in _alike(whole):
            new = ~is_exact[later]
            first, later = first[new], later[new]
            is_exact[later] = True
            examples += [Twin(int(a), int(b), 1.0) for a, b in zip(later[:num_examples], first[:num_examples], strict=True)]
        examples = sorted(examples)[:num_examples]
        if not self._paths["with_words"].stat().st_size:
            return Duplicates(int(is_exact.sum()), 0, examples)
        record = np.memmap(self._paths["with_words"], np.int64, "r")
        with self._paths["minima"].open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        minima = np.frombuffer(mapped, np.uint16).reshape(-1, _MINIMA)
        is_near = np.zeros(self.num_records, bool)
        near: list[Twin] = []
        for band in range(_BANDS):
            for one, two in _alike(np.memmap(self._paths[str(band)], np.uint32, "r")):
                new = ~(is_exact[record[two]] | is_near[record[two]])
                one, two = one[new], two[new]
                for start in range(0, len(one), _COMPARED):
                    a, b = one[start : start + _COMPARED], two[start : start + _COMPARED]
                    mapped.madvise(mmap.MADV_DONTNEED)  # pages of those before
                    similarity = (minima[a] == minima[b]).mean(1)
                    found = similarity >= SIMILAR
                    is_near[record[b[found]]] = True
                    room = max(0, num_examples - len(near))
                    pairs = zip(record[b[found]][:room], record[a[found]][:room], similarity[found][:room], strict=True)
                    near += [Twin(int(x), int(y), float(s)) for x, y, s in pairs]
        return Duplicates(int(is_exact.sum()), int(is_near.sum()), examples + sorted(near))


def _alike(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(earlier, later) places of equal keys: each later one beside the first of its kind, then beside the one before it."""
    parts = -(-len(keys) // _AT_ONCE)
    for part in range(parts):
        chosen = []
        for start in range(0, len(keys), _AT_ONCE):
            block = np.asarray(keys[start : start + _AT_ONCE])
            chosen.append(np.flatnonzero(block % block.dtype.type(parts) == part) + start)
        places = np.concatenate(chosen)
        places = places[np.argsort(keys[places], kind="stable")]
        ordered = keys[places]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(places)), 0))
        yield places[first[again]], places[again]
        yield places[again - 1], places[again]
