"""The corrected copy that `check` writes: a folder with the good records of each file, and a log of the changes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe_train.data.check.findings import CorrectedChunk
from moe_train.data.check.results import FixedResult, ListedChange
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedFile
from moe_train.data.records.file_bytes import is_compressed
from moe_train.machine.files import new_directory


@contextlib.contextmanager
def corrected_copy(settings: CheckSettings, places: list[CheckedFile]) -> Iterator[Corrected | None]:
    """Create the folder of a corrected copy, which appears when the block ends without an error.

    Args:
        settings: Where to write the copy, if at all.
        places: The files.
    """
    if settings.dry_run:
        yield Corrected(None, places, settings)
    elif settings.fix is None:
        yield None
    else:
        with new_directory(settings.fix) as directory:
            yield Corrected(directory, places, settings)


class Corrected:
    """A folder with a copy of each file as JSON lines, and with `changes.log`, which lists what was changed.

    The log is JSON lines too; its name keeps it out of the data if the folder is used as a source. Without a folder the first
    changes of each rule are kept in memory, and the others counted.
    """

    def __init__(self, directory: Path | None, places: list[CheckedFile], settings: CheckSettings) -> None:
        self._directory = directory
        self._places = places
        self._settings = settings
        self._log = None if directory is None else (directory / "changes.log").open("w", encoding="utf-8")
        self._names = _copy_names([place.file for place in places])
        self._open: tuple[int, IO[bytes]] | None = None
        self._changes: list[ListedChange] = []
        self._num_changes: Counter[tuple[str, str]] = Counter()
        self.num_kept = 0
        self.counts: Counter[str] = Counter()
        """Action -> number of records."""

    def add(self, place: int, chunk: CorrectedChunk) -> None:
        """Write the good records of a chunk, and log its changes.

        Args:
            place: Index of the file.
            chunk: The records and the changes.
        """
        if self._directory is not None and chunk.lines:  # no empty copy of a file of which nothing is kept
            self._write(self._directory, place, chunk.lines)
        self.num_kept += chunk.num_records
        for action in ("changed", "left", "dropped"):
            # A record with several changes is counted once.
            self.counts[action] += len({change.number for change in chunk.changes if change.action == action})
        for change in chunk.changes:
            entry: ListedChange = {
                "where": self._places[place].location(change.number),
                "action": change.action,
                "rule": change.rule,
                "what": change.description,
            }
            if self._log is not None:
                # ASCII, since a name in a record or of a file may have half a surrogate pair, which UTF-8 cannot encode.
                self._log.write(json.dumps(entry, ensure_ascii=True) + "\n")
                continue
            self._num_changes[change.action, change.rule] += 1
            if self._num_changes[change.action, change.rule] <= self._settings.num_listed:
                self._changes.append(entry)

    def _write(self, directory: Path, place: int, lines: bytes) -> None:
        """Write lines to the copy of a file."""
        if self._open is None or self._open[0] != place:
            self._close_file()
            path = directory / self._names[place]
            path.parent.mkdir(parents=True, exist_ok=True)
            # Chunks come in the order of the files, so no copy is opened, and so emptied, a second time.
            self._open = place, path.open("wb")
        self._open[1].write(lines)

    def close(self) -> FixedResult:
        """Close the files, and return the counts in JSON form; without a folder with the first changes of each rule."""
        self._close_file()
        result: FixedResult = {
            "directory": None,
            "kept": self.num_kept,
            "changed": self.counts["changed"],
            "left": self.counts["left"],
            "dropped": self.counts["dropped"],
        }
        if self._log is None:
            result["changes"] = self._changes
            return result
        self._log.close()
        result["directory"] = str(self._settings.fix)
        return result

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
        # Files that differ only in a compression suffix would have the same name.
        unique = itertools.chain([name], (name.with_name(f"{name.stem}-{k}{name.suffix}") for k in itertools.count(2)))
        names.append(next(str(n) for n in unique if str(n) not in names))
    return names
