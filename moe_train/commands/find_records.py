"""`moe-train data find`: which sets, steps, checkpoints, exports and later runs hold a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.metadata import WeightOrigin, survey
from moe_train.checkpoint.runs import saved_config
from moe_train.commands.runs import find_runs
from moe_train.data.records.search import Wanted
from moe_train.governance.exports_of_run import ExportEntry, exports_of_run
from moe_train.governance.find_in_runs import RunWithRecord, find_in_run
from moe_train.governance.upstream import checkpoint_of_origin
from moe_train.machine.files import JsonObject


class LaterRun(NamedTuple):
    """A run that started from weights that had learnt from the records."""

    run_dir: Path
    started_from: str
    """The run, or the export of a run, as the later run names it."""
    checkpoints: tuple[int, ...]
    exports: tuple[ExportEntry, ...]


class Found(NamedTuple):
    """Everything that holds a record."""

    runs: tuple[RunWithRecord, ...]
    """Runs whose training or evaluation sets hold it."""
    later_runs: tuple[LaterRun, ...]
    searched: tuple[Path, ...]
    """All runs that were searched."""
    not_searched: tuple[str, ...]
    """What could not be searched, with the reason."""

    def to_json(self) -> JsonObject:
        """Return it as `data find --json` prints it."""
        return {
            "searched": [str(path) for path in self.searched],
            "not_searched": list(self.not_searched),
            "runs": [run_to_json(run) for run in self.runs],
            "later_runs": [
                {
                    "run": str(later.run_dir),
                    "started_from": later.started_from,
                    "checkpoints": list(later.checkpoints),
                    "exports": [entry.directory for entry in later.exports],
                }
                for later in self.later_runs
            ],
        }


def run_to_json(run: RunWithRecord) -> JsonObject:
    """Return what of a run holds the records, for JSON."""
    sets = []
    for searched in run.sets:
        if searched.records:
            records = [record._asdict() for record in searched.records]
            sets.append(
                {"source": f"data.train.{searched.source}", "hash": searched.sha256, "path": searched.path, "records": records}
            )
    return {
        "run": str(run.run_dir),
        "sets": sets,
        "held_out": [record._asdict() for record in run.held_out],
        "steps": None if run.steps is None else list(run.steps),
        "steps_unknown_because": run.why_unknown,
        "checkpoints": list(run.checkpoints) if run.is_trained_on else [],
        "checkpoints_before": list(run.clean_checkpoints),
        "exports": [entry.directory for entry in run.exports] if run.is_trained_on else [],
    }


def find_records(looked_for: Wanted, directories: Sequence[Path]) -> Found:
    """Search the data of every run among or below directories.

    Raises:
        FileNotFoundError: A directory does not exist, or holds no run.
    """
    searched = find_runs(directories)
    runs = []
    not_searched: list[str] = []
    for run_dir in searched:
        try:
            run = find_in_run(run_dir, looked_for)
        # One damaged run must not hide what the others hold.
        except (OSError, ValueError) as error:
            not_searched.append(f"{run_dir}: {' '.join(str(error).split())}")
            continue
        for one_set in run.sets:
            not_searched += [f"{run_dir}: {reason}" for reason in one_set.not_searched]
        if run.is_trained_on or run.held_out:
            runs.append(run)
    return Found(tuple(runs), tuple(_later_runs(runs, searched)), tuple(searched), tuple(not_searched))


def _later_runs(runs: Sequence[RunWithRecord], searched: Sequence[Path]) -> list[LaterRun]:
    """Return the runs that started from affected weights, and those that started from these."""
    # Folder of an affected run -> the first step that is affected.
    affected = {run.run_dir.resolve(): min(run.checkpoints, default=0) for run in runs if run.is_trained_on and run.checkpoints}
    later: dict[Path, LaterRun] = {}
    is_growing = True
    while is_growing:
        is_growing = False
        for run_dir in searched:
            started_from = None if run_dir in later else _affected_origin(run_dir, affected)
            if started_from is not None:
                readable = survey(run_dir).readable
                later[run_dir] = LaterRun(run_dir, started_from, tuple(sorted(readable)), tuple(exports_of_run(run_dir)))
                affected.setdefault(run_dir.resolve(), 0)
                is_growing = True
    return list(later.values())


def _affected_origin(run_dir: Path, affected: dict[Path, int]) -> str | None:
    """Return the affected weights or adapters that a run started from; None if it started from no such thing."""
    for saved in survey(run_dir).readable.values():
        run = config.run_of(saved_config(run_dir, saved.about))
        origins: list[WeightOrigin | None] = [saved.about.base, saved.about.adapter]
        for origin in origins:
            upstream = None if origin is None else checkpoint_of_origin(origin)
            if origin is not None and upstream is not None:
                first = affected.get(upstream.run_dir.resolve())
                # The same folder is the run itself, continued.
                if first is not None and upstream.step >= first and Path(run.run_dir).resolve() != upstream.run_dir.resolve():
                    return origin.source
        return None
    return None
