"""A prepared set: ids on disk or in a bucket, by the number of their example."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.data import manifest
from moe_train.data.manifest import Manifest
from moe_train.data.remote import Remote, open_folder


class Piece(NamedTuple):
    """Positions start to start + length of an example: each an id to see and the next one to predict."""

    example: int
    start: int
    length: int


class TokenStore:
    """N examples, ids of which are read when asked for.

    manifest: what the set is; places: where its files are now, for messages (None: where they were).
    """

    def __init__(self, path: str | Path, places: Sequence[str] | None = None, cache_mib: int = 1024) -> None:
        self.path = str(path)
        self._folder = open_folder(self.path, cache_mib)
        try:
            text = self._folder.text(manifest.NAME)
        except FileNotFoundError:
            what = f"{self.path} holds no {manifest.NAME}; name a folder that `moe-train data prepare` made"
            raise FileNotFoundError(what) from None
        self.manifest: Manifest = manifest.read(text, f"{self.path}/{manifest.NAME}")
        self._places = [file.path for file in self.manifest.files] if places is None else list(places)
        counts = [shard.examples for shard in self.manifest.shards]
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # example of each shard
        self._open = functools.lru_cache(256)(self._shard)  # files stay few, however many shards there are

    def __len__(self) -> int:
        return self.manifest.examples

    def lengths(self) -> np.ndarray:
        """(N,) positions that an example takes in a sequence: one less than its ids, as the last is only a target."""
        shards = self.manifest.shards
        found = [np.diff(self._folder.whole(f"{s.name}/offsets", "int64", s.sizes["offsets"])) - 1 for s in shards]
        return np.concatenate(found)

    def _shard(self, number: int) -> tuple[Any, Any, np.ndarray]:
        """(ids, loss mask or None, offsets) of a shard."""
        shard = self.manifest.shards[number]

        def array(name: str, dtype: str) -> Any:
            return self._folder.array(f"{shard.name}/{name}", dtype, shard.sizes[name])

        offsets = self._folder.whole(f"{shard.name}/offsets", "int64", shard.sizes["offsets"])
        mask = array("loss_mask", "bool") if "loss_mask" in shard.sizes else None
        return array("tokens", self.manifest.dtype), mask, offsets

    def read(self, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Of each piece its ids (length + 1,) and their loss mask; None where every id bears loss."""
        shards = (np.searchsorted(self._first, [piece.example for piece in pieces], side="right") - 1).tolist()
        found = []
        for number, piece in zip(shards, pieces, strict=True):
            tokens, mask, offsets = self._open(number)
            start = int(offsets[piece.example - self._first[number]]) + piece.start
            found.append((tokens, mask, start, start + piece.length + 1))
        if isinstance(self._folder, Remote):
            self._folder.fetch((array, a, b) for tokens, mask, a, b in found for array in (tokens, mask) if array is not None)
        return [(tokens[a:b], None if mask is None else mask[a:b]) for tokens, mask, a, b in found]

    def origin(self, example: int) -> tuple[str, int, bool]:
        """(file, line or row counted from 1, whether it is a line) of the record that an example is of."""
        number = int(np.searchsorted(self._first, example, side="right")) - 1
        shard = self.manifest.shards[number]
        pairs = self._folder.array(f"{shard.name}/origins", "int64", shard.sizes["origins"])
        at = 2 * (example - int(self._first[number]))
        span, line = (int(x) for x in pairs[at : at + 2])
        place = shard.spans[span][0]
        return self._places[place], line, self.manifest.files[place].by_line

    def where(self, example: int) -> str:
        """`path:line`, or `path: row N`."""
        file, number, by_line = self.origin(example)
        return f"{file}{':' if by_line else ': row '}{number}"
