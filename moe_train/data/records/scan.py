"""Scan a local file once: compute its hash, and find the lines at which it can be cut."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from moe_train.data.records import zip_archive
from moe_train.data.records.file_bytes import open_stored
from moe_train.machine.checked_file import read_checked, write_checked

_BYTES = 1 << 22, 1 << 28  # smallest and largest size of a part, which is a sixteenth of its file otherwise
_BLOCK = 1 << 22
_LAYOUT = 2  # version of the layout of cached results


class Scan(NamedTuple):
    """The content of a place of a source."""

    sha256: str | None
    """Hash of the content, if it is known."""
    size: int | None = None
    """Size in bytes, if it is a file."""
    cuts: tuple[tuple[int, int], ...] = ()
    """(byte or index, line) at which each part after the first begins."""
    stop: int | None = None
    """The byte at which the last part stops; None if it is read to the end."""


def scan_file(file: Path, cuttable: bool, memory: Path, bytes_per_part: tuple[int, int] = _BYTES) -> Scan:
    """Hash a file and, if it is `cuttable`, choose where to cut it.

    The result is cached in the folder `memory` until the file changes: its size, its modification time, or the time at which the
    file system saw a change, which a program cannot set back.

    Args:
        file: The file.
        cuttable: Whether the file may be cut between lines.
        memory: The folder of the cache.
        bytes_per_part: Smallest and largest size of a part.
    """
    # A member has no status of its own; it changes with its archive.
    status = (zip_archive.archive_of(file) or file).stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    cache_key = json.dumps([str(file.absolute()), status.st_size, times, status.st_ino, cuttable, bytes_per_part, _LAYOUT])
    cache_file = memory / f"{hashlib.sha256(cache_key.encode()).hexdigest()[:32]}.json"
    # Everything that decides the result is in the name of the file, so it need not be compared.
    remembered = read_checked(cache_file)
    if remembered is not None:
        sha256, size, cuts = json.loads(remembered)
        # `stop` is the size at the time of the scan, so that lines appended later are not read under the old hash.
        return Scan(sha256, size, tuple((byte, line) for byte, line in cuts), size if cuttable else None)
    smallest, largest = bytes_per_part
    step = min(max(status.st_size // 16, smallest), largest)
    digest = hashlib.sha256()
    cuts = []
    position = 0
    line = 1
    goal = step
    with open_stored(file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            while cuttable and goal < position + len(block):
                end = block.find(b"\n", max(goal - position, 0)) + 1
                if not end:  # the line continues in the next block, and the cut comes after it
                    break
                cuts.append((position + end, line + block.count(b"\n", 0, end)))
                goal = position + end + step
            line += block.count(b"\n") if cuttable else 0
            position += len(block)
    scan = Scan(digest.hexdigest(), position, tuple(cut for cut in cuts if cut[0] < position), position if cuttable else None)
    # A file written just now can change again within one tick of its modification time.
    if time.time_ns() - status.st_mtime_ns > 2e9:
        write_checked(cache_file, json.dumps(scan[:3]))
    return scan
