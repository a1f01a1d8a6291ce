"""One pass over a local file: its hash, and the lines at which it can be cut."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from moe_train.machine.files import write_text

_BYTES = 1 << 22, 1 << 28  # of a part: a sixteenth of its file, within these
_BLOCK = 1 << 22


class Scan(NamedTuple):
    """What a place of a source holds.

    sha256: of the content, where it is known; size: in bytes, where it is a file; cuts: (byte or index, line) at which its
    later parts begin; stop: where the last part stops (None: it is read to the end).
    """

    sha256: str | None
    size: int | None = None
    cuts: tuple[tuple[int, int], ...] = ()
    stop: int | None = None


def scan_file(file: Path, cuttable: bool, memory: Path, bytes_per_part: tuple[int, int] = _BYTES) -> Scan:
    """Hash a file and, if it is `cuttable`, choose where to cut it.

    The answer is kept in the folder `memory` until the file changes its size or its time of change.
    """
    status = file.stat()
    known_by = json.dumps([str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ino, cuttable, bytes_per_part])
    known = memory / f"{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.json"
    if known.exists():
        sha256, size, cuts = json.loads(known.read_text())
        return Scan(sha256, size, tuple((byte, line) for byte, line in cuts), size if cuttable else None)
    smallest, largest = bytes_per_part
    step = min(max(status.st_size // 16, smallest), largest)
    digest = hashlib.sha256()
    cuts = []
    at = 0
    line = 1
    goal = step
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            while cuttable and goal < at + len(block):
                end = block.find(b"\n", max(goal - at, 0)) + 1
                if not end:  # the line continues in the next block
                    break
                cuts.append((at + end, line + block.count(b"\n", 0, end)))
                goal = at + end + step
            line += block.count(b"\n") if cuttable else 0
            at += len(block)
    found = Scan(digest.hexdigest(), at, tuple(cut for cut in cuts if cut[0] < at), at if cuttable else None)
    if time.time_ns() - status.st_mtime_ns > 2e9:  # a file that is still being written can change within one tick
        memory.mkdir(parents=True, exist_ok=True)
        write_text(known, json.dumps(found[:3]))
    return found
