"""A prepared set: ids on disk or in a bucket, by the number of their example."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.data.prepared import manifest
from moe_train.data.prepared.folder import File, RemoteFolder, open_folder
from moe_train.data.prepared.manifest import Manifest, ShardEntry
from moe_train.data.records.source import OpenSource, Origin, numbered

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Positions start to start + length of an example: each an id to see and the next one to predict."""

    example: int
    start: int
    length: int


class TokenStore:
    """N examples, ids of which are read when asked for.

    manifest: what the set is; source: its records as they are now, for messages (None: what the manifest says of them).
    """

    def __init__(self, path: str | Path, source: OpenSource | None = None, cache_mib: int = 1024) -> None:
        self.path = str(path)
        self._folder = open_folder(self.path, cache_mib)
        try:
            text = self._folder.text(manifest.NAME)
        except FileNotFoundError:
            what = f"{self.path} holds no {manifest.NAME}; name a folder that `moe-train data prepare` made"
            raise FileNotFoundError(what) from None
        self.manifest: Manifest = manifest.read(text, f"{self.path}/{manifest.NAME}")
        self._source = source
        counts = [shard.examples for shard in self.manifest.shards]
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # example of each shard
        self._open = functools.lru_cache(256)(self._shard)  # files stay few, however many shards there are

    def __len__(self) -> int:
        return self.manifest.examples

    def warn_of_cache(self, window: int | None) -> None:
        """Warn if the records that are shuffled together (`window` positions, None: all) do not fit in memory, so that almost
        each is fetched as a block of its own."""
        if not isinstance(self._folder, RemoteFolder):
            return
        size = sum(shard.sizes[name] for shard in self.manifest.shards for name in ("tokens", "loss_mask") if name in shard.sizes)
        a_token = size / self.manifest.tokens
        at_once = size if window is None else min(size, 2 * window * a_token)
        if at_once > self._folder.cache_bytes:
            log.warning(
                "%s: %d MiB of records are shuffled at a time, and %d MiB stay in memory, so that most records are fetched with a "
                "MiB around them; set data.shuffle_tokens to %d at most, or cache_mib to %d",
                *(self.path, at_once / 2**20, self._folder.cache_bytes / 2**20),
                *(self._folder.cache_bytes / 2 / a_token, math.ceil(at_once / 2**20)),
            )

    def lengths(self) -> np.ndarray:
        """(N,) positions that an example takes in a sequence: one less than its ids, as the last is only a target."""
        offsets = self._folder.read_whole([_file(shard, "offsets", "int64") for shard in self.manifest.shards])
        return np.concatenate([np.diff(ends) - 1 for ends in offsets])

    def _shard(self, number: int) -> tuple[Any, Any, Any]:
        """(ids, loss mask or None, offsets) of a shard."""
        shard = self.manifest.shards[number]
        mask = self._folder.array(_file(shard, "loss_mask", "bool")) if "loss_mask" in shard.sizes else None
        tokens = self._folder.array(_file(shard, "tokens", self.manifest.dtype))
        return tokens, mask, self._folder.array(_file(shard, "offsets", "int64"))

    def read(self, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """The ids (length + 1,) of each piece and their loss mask (None where every id bears loss)."""
        located = self._located(pieces)
        parts = [(array, a, b) for tokens, mask, a, b in located for array in (tokens, mask) if array is not None]
        found = iter(self._folder.read(parts))
        return [(next(found), None if mask is None else next(found)) for _, mask, _, _ in located]

    def masks(self, pieces: Sequence[Piece]) -> list[np.ndarray | None]:
        """The loss masks of `read` alone."""
        located = self._located(pieces)
        found = iter(self._folder.read([(mask, a, b) for _, mask, a, b in located if mask is not None]))
        return [None if mask is None else next(found) for _, mask, _, _ in located]

    def _located(self, pieces: Sequence[Piece]) -> list[tuple[Any, Any, int, int]]:
        """(ids, loss mask or None, start, stop) of each piece."""
        shards = (np.searchsorted(self._first, [piece.example for piece in pieces], side="right") - 1).tolist()
        opened = [self._open(number) for number in shards]
        rows = [int(piece.example - self._first[number]) for number, piece in zip(shards, pieces, strict=True)]
        begin = self._folder.read([(offsets, row, row + 1) for (_, _, offsets), row in zip(opened, rows, strict=True)])
        starts = [int(offset[0]) + piece.start for offset, piece in zip(begin, pieces, strict=True)]
        ends = [start + piece.length + 1 for start, piece in zip(starts, pieces, strict=True)]
        return [(tokens, mask, a, b) for (tokens, mask, _), a, b in zip(opened, starts, ends, strict=True)]

    def origin(self, example: int) -> Origin:
        """Where the record of an example stands in the source."""
        number = int(np.searchsorted(self._first, example, side="right")) - 1
        shard = self.manifest.shards[number]
        pairs = self._folder.array(_file(shard, "origins", "int64"))
        at = 2 * (example - int(self._first[number]))
        span, line = (int(x) for x in pairs[at : at + 2])
        return Origin(shard.spans[span][0], line)

    def place(self, origin: Origin) -> str:
        """The name of the file, or of whatever else the record is from."""
        return self.manifest.files[origin.place].path if self._source is None else self._source.names[origin.place]

    def where(self, example: int) -> str:
        """Where the record of an example comes from, for messages: `path:line`, or `path: row N`."""
        origin = self.origin(example)
        if self._source is not None:
            return self._source.where(origin)
        file = self.manifest.files[origin.place]
        return numbered(file.path, origin.number, file.by_line)


def _file(shard: ShardEntry, name: str, dtype: str) -> File:
    return File(f"{shard.name}/{name}", dtype, shard.sizes[name])
