"""From a run or an export upstream: the checkpoint that it is, and the trainings that made it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.metadata import WeightOrigin, survey
from moe_train.checkpoint.runs import is_run, named_step, run_folder, saved_config, steps_in_words
from moe_train.governance.exports_of_run import ExportEntry, exports_of_run, hash_of_record
from moe_train.governance.lineage import Training, training_of
from moe_train.machine.files import read_object
from moe_train.proof.surroundings import RECORD_FILE

_LONGEST_CHAIN = 100
"""Largest number of trainings on one another; more would be a circle of runs that were moved."""


class CheckpointOfRun(NamedTuple):
    """A checkpoint that evidence is about."""

    run_dir: Path
    step: int


def checkpoint_of(source: Path, run_dir: Path | None = None) -> CheckpointOfRun:
    """Return the checkpoint that a run names, or that an export was written from.

    Args:
        source: A run (`RUN`, `RUN@STEP`), or a directory that was exported from one.
        run_dir: The run of an export, if it is not where the export's record says.

    Raises:
        FileNotFoundError: `source` is neither, its run is not here, or it has no such checkpoint.
        ValueError: The export is not one of the stated run, or was not trained here.
    """
    if is_run(source):
        if run_dir is not None:
            raise ValueError(f"--run would have no effect: {source} is a run itself; leave it out")
        return _existing(run_folder(source), named_step(source))
    if not (source / RECORD_FILE).is_file():
        raise FileNotFoundError(f"{source} is neither a run nor a directory that `moe-train export` wrote; name one of them")
    record = read_object(source / RECORD_FILE)
    if "run" not in record:
        raise ValueError(
            f"{source} was exported from {record.get('source')}, which is no run, so there is no training to give evidence of; "
            f"its records are {source / RECORD_FILE}, README.md and ml_bom.cdx.json"
        )
    stated = Path(record["source"]) if run_dir is None else run_dir
    folder = _found(source, stated)
    if folder is None:
        raise FileNotFoundError(f"{source} was exported from the run {stated}, which is not here; name it with --run RUN")
    origin = _existing(folder, record["step"])
    about = survey(folder).readable[origin.step].about
    if about.data != record["data_sha256"]:
        raise ValueError(
            f"{source} was not exported from step {origin.step} of {folder}: its data are others; name the run with --run"
        )
    return origin


def _found(source: Path, stated: Path) -> Path | None:
    """Return the folder of a run, whose path may be relative to a folder above the export; None if it is not here."""
    for folder in (Path(), *source.absolute().parents):
        if is_run(folder / stated):
            return folder / stated
    return None


def _existing(folder: Path, step: int | None) -> CheckpointOfRun:
    """Return a checkpoint that can be read; the newest if no step is stated."""
    readable = survey(folder).readable
    if step is None:
        step = next(iter(readable), None)
    if step is None or step not in readable:
        wanted = "checkpoint that can be read" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"{folder} has no {wanted}; it has {steps_in_words(readable)}")
    return CheckpointOfRun(folder, step)


def trainings_of(origin: CheckpointOfRun) -> tuple[Training, ...]:
    """Return the training of a checkpoint, then the one that made its base, and so on as far as the runs are here."""
    trainings: list[Training] = []
    at: CheckpointOfRun | None = origin
    while at is not None and len(trainings) < _LONGEST_CHAIN:
        about = survey(at.run_dir).readable[at.step].about
        run = config.run_of(saved_config(at.run_dir, about))
        trainings.append(training_of(at.run_dir, run, about, at.step))
        at = None if about.base is None else checkpoint_of_origin(about.base)
    return tuple(trainings)


def checkpoint_of_origin(origin: WeightOrigin) -> CheckpointOfRun | None:
    """Return the checkpoint that a base or adapter is, or was exported from; None if no run is here that made it."""
    source = Path(origin.source)
    try:
        if is_run(source):
            return _existing(run_folder(source), origin.step)
        if (source / RECORD_FILE).is_file():
            return checkpoint_of(source)
    except (FileNotFoundError, ValueError):
        return None
    return None


def exports_of(origin: CheckpointOfRun, source: Path) -> list[ExportEntry]:
    """Return the exports of a checkpoint that its run lists, and the one that is named.

    An earlier version listed none, and a run may have been moved, so a directory that is named counts in any case.
    """
    entries = [entry for entry in exports_of_run(origin.run_dir) if entry.step == origin.step]
    if is_run(source) or any(Path(entry.directory) == source.absolute() for entry in entries):
        return entries
    record = read_object(source / RECORD_FILE)
    named = ExportEntry("not recorded", str(source.absolute()), record["format"], origin.step, hash_of_record(source), ())
    return [*entries, named]
