"""Divide a source into shards that are tokenized one by one, each with a key that tells whether it was made before."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource, Span

_SMALLEST = 1 << 22  # small files share a shard of up to this many bytes


class Shard(NamedTuple):
    """A part of a source that is tokenized at once."""

    key: str
    """A hash of the content and of how it is tokenized; it does not depend on where the files are."""
    spans: tuple[Span, ...]


def cut(source: OpenSource, scans: list[Scan], made_of: str, smallest: int = _SMALLEST) -> list[Shard]:
    """Divide a source into shards, in order: parts of large places, and several small files in one.

    Args:
        source: The source.
        scans: The scan of each of its places.
        made_of: Text that describes everything besides the content that decides the ids of a record.
        smallest: Bytes up to which small files share a shard.
    """
    groups: list[list[Span]] = []
    free_bytes = 0
    for place, scan in enumerate(scans):
        # A place begins at byte (or index) 0 on line 1; each cut ends one part and begins the next.
        starts = [(0, 1), *scan.cuts]
        stops = [*(position for position, _ in scan.cuts), scan.stop]
        for (start, line), stop in zip(starts, stops, strict=True):
            size: int | None = None
            if scan.size is not None:
                size = (scan.size if stop is None else stop) - start
            # A place of unknown size gets a shard of its own.
            if not groups or size is None or size > free_bytes:
                groups.append([])
                free_bytes = smallest
            groups[-1].append(Span(place, start, stop, line))
            free_bytes -= size or 0
    shards = []
    for spans in groups:
        # By content, not by path: a file that is moved or renamed keeps its shards.
        contents: list[list[str | int | None]] = [
            # The kind belongs to the key, since the same bytes give other records in another format.
            [source.places[span.place].kind, scans[span.place].sha256, span.start, span.stop]
            for span in spans
        ]
        shards.append(Shard(_key(made_of, contents), tuple(spans)))
    return shards


def _key(made_of: str, contents: list[list[str | int | None]]) -> str:
    """Return the key of a shard."""
    return hashlib.sha256(json.dumps([made_of, contents]).encode()).hexdigest()[:32]
