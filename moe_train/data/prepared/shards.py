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
    room = 0
    for place, found in enumerate(scans):
        starts = [(0, 1), *found.cuts]
        stops = [*(at for at, _ in found.cuts), found.stop]
        for (start, line), stop in zip(starts, stops, strict=True):
            size = None if found.size is None else (found.size if stop is None else stop) - start
            if not groups or size is None or size > room:
                groups.append([])
                room = smallest
            groups[-1].append(Span(place, start, stop, line))
            room -= size or 0
    keys = [[[source.places[s.place].kind, scans[s.place].sha256, s.start, s.stop] for s in spans] for spans in groups]
    return [Shard(_key(made_of, contents), tuple(spans)) for contents, spans in zip(keys, groups, strict=True)]


def _key(made_of: str, contents: list[list[str | int | None]]) -> str:
    """Return the key of a shard."""
    return hashlib.sha256(json.dumps([made_of, contents]).encode()).hexdigest()[:32]
