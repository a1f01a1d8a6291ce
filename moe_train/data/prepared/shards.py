"""A source in parts that are tokenised one by one: what each holds, and a key that says whether it was made before."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from moe_train.data.records.sources import Records, Span
from moe_train.machine.files import write_text

_BYTES = 1 << 22, 1 << 28  # of a shard: a sixteenth of its file, within these
_BLOCK = 1 << 22


class Scan(NamedTuple):
    """What one pass over a file finds; cuts: (byte, line) at which its later shards begin."""

    sha256: str
    size: int
    cuts: tuple[tuple[int, int], ...]


class Shard(NamedTuple):
    """key: a hash of the bytes and of what is made of them, wherever the files lie."""

    key: str
    spans: tuple[Span, ...]


def scan(file: Path, cuttable: bool, memory: Path, bytes_per_shard: tuple[int, int] = _BYTES) -> Scan:
    """Hash a file and choose where to cut it. The answer is kept in the folder `memory` until the file changes its size
    or its time of change."""
    status = file.stat()
    known_by = json.dumps([str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ino, cuttable, bytes_per_shard])
    known = memory / f"{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.json"
    if known.exists():
        sha256, size, cuts = json.loads(known.read_text())
        return Scan(sha256, size, tuple((byte, line) for byte, line in cuts))
    smallest, largest = bytes_per_shard
    step = min(max(status.st_size // 16, smallest), largest)
    digest, at, line, goal = hashlib.sha256(), 0, 1, step
    cuts = []
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            while cuttable and goal < at + len(block):
                end = block.find(b"\n", max(goal - at, 0)) + 1
                if not end:  # the line goes on in the next block
                    break
                cuts.append((at + end, line + block.count(b"\n", 0, end)))
                goal = at + end + step
            line += block.count(b"\n") if cuttable else 0
            at += len(block)
    found = Scan(digest.hexdigest(), at, tuple(cut for cut in cuts if cut[0] < at))
    if time.time_ns() - status.st_mtime_ns > 2e9:  # a file that is still being written can change within one tick
        memory.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(found))
    return found


def cut(records: Records, scans: list[Scan], made_of: str, smallest: int = _BYTES[0]) -> list[Shard]:
    """The shards of a source in order: parts of large files, and several small files in one."""
    if not records.files:
        return [Shard(_key(made_of, [[records.pinned, 0, None]]), (Span(0),))]
    groups: list[list[Span]] = []
    room = 0
    for place, (found, cuttable) in enumerate(zip(scans, records.cuttable, strict=True)):
        starts = [(0, 1), *found.cuts]
        stops = [byte for byte, _ in found.cuts] + [found.size]
        for (start, line), stop in zip(starts, stops, strict=True):
            if not groups or stop - start > room:
                groups.append([])
                room = smallest
            groups[-1].append(Span(place, start, stop if cuttable else None, line))
            room -= stop - start
    return [
        Shard(_key(made_of, [[records.kinds[s.place], scans[s.place].sha256, s.start, s.stop] for s in spans]), tuple(spans))
        for spans in groups
    ]


def _key(made_of: str, contents: list[list[str | int | None]]) -> str:
    return hashlib.sha256(json.dumps([made_of, contents]).encode()).hexdigest()[:32]
