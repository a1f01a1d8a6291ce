"""The chain from raw data to served files: what each record states, and whether the files are still those that it states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, WeightOrigin
from moe_train.data.prepared.manifest import Manifest
from moe_train.governance.exports_of_run import ExportEntry, hash_of_record
from moe_train.governance.lineage import Training
from moe_train.machine.files import JsonObject, read_object
from moe_train.machine.revision import CodeRevision
from moe_train.proof.surroundings import RECORD_FILE, file_hashes

FileState = Literal["unchanged", "changed", "not here"]
"""Whether a file still has the hash that a record states."""


class HashedFile(NamedTuple):
    """A file, and the hash that a record states for it."""

    path: str
    sha256: str
    state: FileState


class ExportedDirectory(NamedTuple):
    """An export, with the hashes of its own record."""

    entry: ExportEntry
    files: tuple[HashedFile, ...]
    """Empty if the directory is not here."""
    code: JsonObject | None
    """Revision of the code that exported it; None if an earlier version did, or if the directory is not here."""


class Provenance(NamedTuple):
    """Where a model came from, from the raw files to the exported ones."""

    raw_files: tuple[HashedFile, ...]
    sets: tuple[Manifest, ...]
    trainings: tuple[Training, ...]
    """The training, then the one that made its base, and so on as far as the runs are here."""
    run_dir: str
    checkpoint: dict[str, str]
    """sha256 of each file of the checkpoint, by relative path."""
    exports: tuple[ExportedDirectory, ...]
    code: CodeRevision
    """Revision of the code that wrote this."""

    def to_json(self) -> JsonObject:
        """Return the chain as `provenance.json` states it."""
        training = self.trainings[0]
        return {
            "raw_files": [file._asdict() for file in self.raw_files],
            "prepared_sets": [_set_to_json(manifest) for manifest in self.sets],
            "data_sha256": training.data_hash,
            "trainings": [_training_to_json(entry) for entry in self.trainings],
            "run_dir": self.run_dir,
            "checkpoint": {"step": training.step, "files": self.checkpoint},
            "exports": [_export_to_json(export) for export in self.exports],
            "written_by": self.code._asdict(),
        }


def _set_to_json(manifest: Manifest) -> JsonObject:
    keys = ("hash", "licence", "origin", "records", "examples", "tokens", "loss_tokens", "tokenizer_sha256", "rules_sha256")
    return {
        **{key: getattr(manifest, key) for key in keys},
        "files": [file.model_dump(mode="json") for file in manifest.files],
    }


def _training_to_json(training: Training) -> JsonObject:
    return {
        "run": training.run.name,
        "step": training.step,
        "base": _origin_to_json(training.base),
        "sessions": [_session_to_json(session) for session in training.sessions],
    }


def _origin_to_json(origin: WeightOrigin | None) -> JsonObject | None:
    if origin is None:
        return None
    return {"source": origin.source, "step": origin.step, "sha256": dict(origin.hashes)}


def _session_to_json(session: JsonObject) -> JsonObject:
    """Return what `run.json` states about a start, without the hashes of the base, which `base` states."""
    keys = ("event", "time", "step", "command", "code", "versions", "hardware", "config_sha256")
    return {key: session.get(key) for key in keys}


def _export_to_json(export: ExportedDirectory) -> JsonObject:
    files = [file._asdict() for file in export.files]
    return {**export.entry._asdict(), "command": list(export.entry.command), "code": export.code, "files": files}


def raw_files_of(sets: Sequence[Manifest]) -> Iterator[HashedFile]:
    """Yield each raw file of prepared sets once, and compare it with the hash that the manifest states.

    Data sets of the hub have no hash of their own, and are left out: their name pins a revision.
    """
    seen: set[str] = set()
    for manifest in sets:
        for file in manifest.files:
            if file.sha256 is not None and file.path not in seen:
                seen.add(file.path)
                yield HashedFile(file.path, file.sha256, state_of(Path(file.path), file.sha256))


def state_of(path: Path, sha256: str) -> FileState:
    """Return whether a file has a hash."""
    if not path.is_file():
        return "not here"
    with path.open("rb") as content:
        return "unchanged" if hashlib.file_digest(content, "sha256").hexdigest() == sha256 else "changed"


def checkpoint_files(run_dir: Path, step: int) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint, by its path relative to the run."""
    folder = run_dir / CHECKPOINTS_FOLDER / str(step)
    return {f"{CHECKPOINTS_FOLDER}/{step}/{name}": digest for name, digest in file_hashes(folder).items()}


def exported_directory(entry: ExportEntry) -> ExportedDirectory:
    """Compare the files of an export with its own record.

    Raises:
        ValueError: its record is not the one that was written, so nothing that it states can be relied on.
    """
    directory = Path(entry.directory)
    if not (directory / RECORD_FILE).is_file():
        return ExportedDirectory(entry, (), None)
    if hash_of_record(directory) != entry.record_sha256:
        raise ValueError(
            f"{directory / RECORD_FILE} is not the record of the export of {entry.time}; "
            f"repeat the export into another directory, or remove {directory}"
        )
    record = read_object(directory / RECORD_FILE)
    files = [HashedFile(name, digest, state_of(directory / name, digest)) for name, digest in record["files"].items()]
    return ExportedDirectory(entry, tuple(files), record.get("code"))
