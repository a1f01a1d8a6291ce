"""`moe-train data erase`: copies of data files without some records, and what else has to go."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.metadata import survey
from moe_train.checkpoint.runs import saved_config
from moe_train.commands.find_records import Found, find_records
from moe_train.data.prepared.manifest import MANIFEST
from moe_train.data.records.file_bytes import is_compressed
from moe_train.data.records.search import LocatedRecord, Wanted, records_of
from moe_train.governance.find_in_runs import RunWithRecord
from moe_train.governance.lineage import manifests_of
from moe_train.machine.files import JsonObject, new_directory


class _FileToCopy(NamedTuple):
    """A data file, and the numbers of the lines or rows that are left out of its copy."""

    path: Path
    file_format: str
    erased: frozenset[int]


def erase_records(looked_for: Wanted, directories: Sequence[Path], out: Path) -> JsonObject:
    """Write the data files of every run that holds a record anew, without it, and say what else holds it.

    Files of JSON lines and of text keep the bytes of every other line; other formats become JSON lines. Nothing else is changed
    or deleted.

    Args:
        looked_for: The record.
        directories: Runs, or folders of runs.
        out: The directory to create; it must be empty or not exist yet.

    Returns:
        The new files, and what to do, ready for JSON.

    Raises:
        FileNotFoundError: No run holds the record, or the files that hold it are gone.
    """
    found = find_records(looked_for, directories)
    records = list(_records(found))
    if not records:
        raise FileNotFoundError("no data file of these runs holds such a record, so nothing was written; see `moe-train data find`")
    missing = sorted({record.file for record in records if not Path(record.file).is_file()})
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}, which holds the record, is not here; restore it, or leave it out of the next run's data"
        )
    copies = list(_copies(found, records))
    names = _names_below([copy.path for copy in copies])
    with new_directory(out) as folder:
        for copy, name in zip(copies, names, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _write_copy(copy, folder / name)
    new_files = {str(copy.path): str(out / name) for copy, name in zip(copies, names, strict=True)}
    return {
        "directory": str(out),
        "erased": sorted({record.location for record in records}),
        "files": new_files,
        "what_to_do": what_to_do(found, new_files),
        "found": found.to_json(),
    }


def _records(found: Found) -> Iterator[LocatedRecord]:
    """Yield every record that was found, held-out ones included."""
    for run in found.runs:
        yield from run.held_out
        for searched in run.sets:
            yield from searched.records


def _copies(found: Found, records: Sequence[LocatedRecord]) -> Iterator[_FileToCopy]:
    """Yield each file of the sources that hold a record once, also those files that hold none."""
    erased: dict[str, set[int]] = {}
    for record in records:
        erased.setdefault(record.file, set()).add(record.number)
    seen: set[str] = set()
    for run in found.runs:
        for file, file_format in _files_of(run):
            if file not in seen and Path(file).is_file():
                seen.add(file)
                yield _FileToCopy(Path(file), file_format, frozenset(erased.get(file, ())))


def _files_of(run: RunWithRecord) -> Iterator[tuple[str, str]]:
    """Yield (path, format) for each file of the sources of a run that hold a record."""
    data = _config_of(run.run_dir).training_data()
    manifests = manifests_of(run.run_dir / MANIFEST)
    for searched in run.sets:
        if searched.records:
            source = data.train[searched.source]
            file_format = source.format if isinstance(source, config.FileSource) else "auto"
            yield from ((file.path, file_format) for file in manifests[searched.source].files)
    for record in run.held_out:
        yield (
            record.file,
            next(source.format for source in data.eval if isinstance(source, config.FileSource) and record.file in source.files),
        )


def _config_of(run_dir: Path) -> config.Run:
    saved = next(iter(survey(run_dir).readable.values()))
    return config.run_of(saved_config(run_dir, saved.about))


def _names_below(paths: Sequence[Path]) -> list[str]:
    """Return the name of each copy below one folder; the copy of a file in another format ends in .jsonl."""
    absolute = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    names = []
    for path in absolute:
        name = str(path.relative_to(root))
        names.append(name if _keeps_bytes(path) else f"{name}.jsonl")
    return names


def _keeps_bytes(path: Path) -> bool:
    """Return whether the lines of a file are copied as they are."""
    return path.suffix.lower() in (".jsonl", ".ndjson", ".txt") and not is_compressed(path)


def _write_copy(copy: _FileToCopy, target: Path) -> None:
    """Write a file without the erased records."""
    if not copy.erased and _keeps_bytes(copy.path):
        shutil.copyfile(copy.path, target)
        return
    with target.open("wb") as file:
        if _keeps_bytes(copy.path):
            with copy.path.open("rb") as lines:
                file.writelines(line for number, line in enumerate(lines, 1) if number not in copy.erased)
            return
        for number, record in records_of(copy.path, copy.file_format):
            if number not in copy.erased:
                file.write(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")


def what_to_do(found: Found, new_files: Mapping[str, str]) -> list[str]:
    """Return what still holds the record, and how each of these is replaced, one line each."""
    lines = []
    for run in found.runs:
        lines += _lines_of_run(run, new_files)
    for later in found.later_runs:
        lines.append(f"{later.run_dir} started from {later.started_from}: train it again from weights without the record")
        lines += [f"delete the export {entry.directory} of {later.run_dir}, step {entry.step}" for entry in later.exports]
    lines += [f"delete {file}, which holds the record; its copy without it is {copy}" for file, copy in new_files.items()]
    lines += [f"could not be searched: {reason}" for reason in found.not_searched]
    return lines


def _lines_of_run(run: RunWithRecord, new_files: Mapping[str, str]) -> list[str]:
    """Return what to do about one run."""
    lines = []
    for searched in run.sets:
        if searched.records and searched.path is not None:
            lines.append(f"delete the prepared set {searched.path}: it holds the record as tokens")
    if not run.is_trained_on:
        return [f"{run.run_dir} measures with the record, and has not learnt from it: replace data.eval in its next run"]
    if run.checkpoints:
        steps = ", ".join(map(str, run.checkpoints))
        known = f"first in step {min(run.steps)}" if run.steps else f"in steps that cannot be told: {run.why_unknown}"
        lines.append(f"delete the checkpoints {steps} of {run.run_dir}, which learnt from the record ({known})")
    for entry in run.exports:
        lines.append(f"delete the export {entry.directory}, and take it out of service: it is step {entry.step}")
    lines.append(f"train again: {_command(run, new_files)}")
    if run.clean_checkpoints:
        newest = max(run.clean_checkpoints)
        key = "init_from" if _config_of(run.run_dir).lora is None else "lora.init_from"
        lines.append(f"with {key}={run.run_dir}@{newest} it starts from a checkpoint that was saved before the record was learnt")
    elif _config_of(run.run_dir).lora is not None:
        lines.append(f"the base of {run.run_dir} is not affected: only its adapter learnt from the record")
    return lines


def _command(run: RunWithRecord, new_files: Mapping[str, str]) -> str:
    """Return the command that trains a run again on the new files."""
    words = ["moe-train", "train", str(run.run_dir / "config.yaml"), f"run_dir={run.run_dir}-erased"]
    data = _config_of(run.run_dir).training_data()
    for searched in run.sets:
        source = data.train[searched.source]
        if searched.records and isinstance(source, config.FileSource):
            manifest = manifests_of(run.run_dir / MANIFEST)[searched.source]
            files = [new_files[file.path] for file in manifest.files if file.path in new_files]
            words.append(f"data.train.{searched.source}.files={json.dumps(files)}")
    return shlex.join(words)
