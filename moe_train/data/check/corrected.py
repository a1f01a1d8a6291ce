"""The corrected copy that `check` writes: a folder with the good records of each file, and a log of the changes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moe_train.data.check.chunks import CheckedFile
from moe_train.data.check.examine import Findings
from moe_train.data.records.file_bytes import is_compressed
from moe_train.machine.files import new_directory


@contextlib.contextmanager
def corrected_copy(fix: Path | None, places: list[CheckedFile]) -> Iterator[Corrected | None]:
    """Create the folder of a corrected copy, which appears when the block ends without an error.

    Args:
        fix: The folder; None for no copy.
        places: The files.
    """
    if fix is None:
        yield None
        return
    with new_directory(fix) as directory:
        yield Corrected(directory, places)


class Corrected:
    """A folder with a copy of each file as JSON lines, and with `changes.log`, which lists what was changed.

    The log is JSON lines too; its name keeps it out of the data if the folder is used as a source.
    """

    def __init__(self, directory: Path, places: list[CheckedFile]) -> None:
        self._directory = directory
        self._places = places
        self._changes = (directory / "changes.log").open("w", encoding="utf-8")
        self._names = _copy_names([place.file for place in places])
        self._open: tuple[int, IO[bytes]] | None = None
        self.kept = 0
        self.counts: Counter[str] = Counter()

    def add(self, found: Findings) -> None:
        """Write the good records of a chunk, and log its changes."""
        assert found.kept is not None
        if self._open is None or self._open[0] != found.place:
            self._close_file()
            path = self._directory / self._names[found.place]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = found.place, path.open("wb")
        self._open[1].write(found.kept.lines)
        self.kept += found.kept.num_records
        for action in ("changed", "dropped"):
            self.counts[action] += len({change.number for change in found.kept.changes if change.action == action})
        for change in found.kept.changes:
            entry = {"where": self._places[found.place].where(change.number), **change._asdict()}
            del entry["number"]
            self._changes.write(json.dumps(entry, ensure_ascii=True) + "\n")

    def close(self, written: Path | None) -> dict[str, Any]:
        """Close the files, and return the counts in JSON form."""
        self._close_file()
        self._changes.close()
        return {"directory": str(written), "kept": self.kept, "changed": self.counts["changed"], "dropped": self.counts["dropped"]}

    def _close_file(self) -> None:
        """Close the copy that is being written."""
        if self._open is not None:
            self._open[1].close()


def _copy_names(paths: list[Path]) -> list[str]:
    """Return a file name for each path, below one folder, that keeps the directory tree; every name ends as JSON lines do."""
    absolute = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    names: list[str] = []
    for path in absolute:
        relative = path.relative_to(root)
        name = Path(relative.stem) if is_compressed(relative) else Path(relative.name)
        if name.suffix.lower() not in (".jsonl", ".ndjson"):
            name = Path(f"{name}.jsonl")
        name = relative.parent / name
        unique = itertools.chain([name], (name.with_name(f"{name.stem}-{k}{name.suffix}") for k in itertools.count(2)))
        names.append(next(str(n) for n in unique if str(n) not in names))
    return names
