"""`exports.jsonl` of a run: one line for each directory that was exported from it, so that a run leads to its exports."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from moe_train.proof.surroundings import RECORD_FILE

log = logging.getLogger(__name__)

EXPORTS_FILE = "exports.jsonl"
"""Name of the file in the folder of a run."""


class ExportEntry(NamedTuple):
    """An export of a run; the fields are the keys of a line."""

    time: str
    """Time of the export in UTC, in ISO format."""
    directory: str
    """Absolute path of the directory at that time."""
    layout: str
    """Format of the files: hf, mistral, gguf, peft, mistral-lora or gguf-lora."""
    step: int
    """Step of the checkpoint."""
    record_sha256: str
    """Hash of its `export_proof.json`, which states the hash of every other file."""
    command: tuple[str, ...]
    """Command line of the process that exported it."""


def note_export(run_dir: Path, entry: ExportEntry) -> None:
    """Append a line to the run's file; a folder that cannot be written to gives a warning, since the export itself is complete."""
    try:
        # Appended in one write, so that two exports at the same time give two whole lines.
        with (run_dir / EXPORTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry._asdict()) + "\n")
    except OSError as error:
        log.warning("%s cannot be written to (%s), so the run does not list this export", run_dir, error.strerror)


def hash_of_record(directory: Path) -> str:
    """Return the sha256 of the record of an export."""
    return hashlib.sha256((directory / RECORD_FILE).read_bytes()).hexdigest()


def exports_of_run(run_dir: Path) -> list[ExportEntry]:
    """Return the exports of a run, the oldest first; a damaged line is left out with a warning."""
    path = run_dir / EXPORTS_FILE
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            fields = json.loads(line)
            entries.append(ExportEntry(**{**fields, "command": tuple(fields["command"])}))
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s:%d is damaged (%s) and left out", path, number, " ".join(str(error).split())[:200])
    return entries
