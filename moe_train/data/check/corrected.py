"""The corrected copy that `check` writes: a folder with the good records of each file, and a log of the changes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from moe_train.data.check.chunks import CheckedFile
from moe_train.data.check.findings import Findings
from moe_train.data.records.file_bytes import is_compressed
from moe_train.machine.files import new_directory


class CopySettings(Protocol):
    """The settings of a corrected copy."""

    @property
    def fix(self) -> Path | None:
        """The folder; None for no copy."""

    @property
    def dry_run(self) -> bool:
        """Whether to count the changes without writing a copy."""

    @property
    def shown(self) -> int:
        """Number of changes to keep for each rule, if no copy is written."""


@contextlib.contextmanager
def corrected_copy(settings: CopySettings, places: list[CheckedFile]) -> Iterator[Corrected | None]:
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

    def __init__(self, directory: Path | None, places: list[CheckedFile], settings: CopySettings) -> None:
        self._directory = directory
        self._places = places
        self._settings = settings
        self._log = None if directory is None else (directory / "changes.log").open("w", encoding="utf-8")
        self._names = _copy_names([place.file for place in places])
        self._open: tuple[int, IO[bytes]] | None = None
        self._changes: list[dict[str, Any]] = []
        self._num_changes: Counter[tuple[str, str]] = Counter()
        self.kept = 0
        self.counts: Counter[str] = Counter()

    def add(self, found: Findings) -> None:
        """Write the good records of a chunk, and log its changes."""
        assert found.kept is not None
        if self._directory is not None:
            self._write(self._directory, found.place, found.kept.lines)
        self.kept += found.kept.num_records
        for action in ("changed", "left", "dropped"):
            self.counts[action] += len({change.number for change in found.kept.changes if change.action == action})
        for change in found.kept.changes:
            entry = {"where": self._places[found.place].where(change.number), **change._asdict()}
            del entry["number"]
            if self._log is not None:
                self._log.write(json.dumps(entry, ensure_ascii=True) + "\n")
                continue
            self._num_changes[change.action, change.rule] += 1
            if self._num_changes[change.action, change.rule] <= self._settings.shown:
                self._changes.append(entry)

    def _write(self, directory: Path, place: int, lines: bytes) -> None:
        """Write lines to the copy of a file."""
        if self._open is None or self._open[0] != place:
            self._close_file()
            path = directory / self._names[place]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = place, path.open("wb")
        self._open[1].write(lines)

    def close(self) -> dict[str, Any]:
        """Close the files, and return the counts in JSON form; without a folder with the first changes of each rule."""
        self._close_file()
        counts = {"kept": self.kept, **{action: self.counts[action] for action in ("changed", "left", "dropped")}}
        if self._log is None:
            return {"directory": None, **counts, "changes": self._changes}
        self._log.close()
        return {"directory": str(self._settings.fix), **counts}

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
