"""The files that a run started from, and what of them is not trained: a tower and projector, or a second copy in another layout."""

from __future__ import annotations

from pathlib import Path

from moe_train import config
from moe_train.checkpoint.runs import is_run, read_run
from moe_train.weights import external
from moe_train.weights.on_disk import Carried


def runs_from(source: str | Path) -> list[config.Run]:
    """Return the run in `source` and the runs that it started from, one after the other; [] for an external model."""
    seen: set[Path] = set()
    runs: list[config.Run] = []
    path: Path | None = Path(source)
    # `seen` ends the loop if configs name each other's runs.
    while path is not None and is_run(path) and path not in seen:
        seen.add(path)
        run = read_run(path)
        runs.append(run)
        path = None if run.init_from is None else Path(run.init_from)
    return runs


def first_path(source: str | Path) -> Path | None:
    """Return the path of the files that a run started from, through other runs if need be, or of the model itself.

    Returns:
        The path, which may no longer exist; None for a run from random weights.
    """
    seen: set[Path] = set()
    path = Path(source)
    # `seen` ends the loop if configs name each other's runs.
    while is_run(path) and path not in seen:
        seen.add(path)
        start = read_run(path).init_from
        if start is None:
            return None
        path = Path(start)
    return None if path in seen else path


def first_files(source: str | Path) -> Path | None:
    """Return the files that a run started from, like `first_path`; None if they do not exist."""
    path = first_path(source)
    return path if path is not None and path.exists() else None


def carried_of(source: str | Path) -> Carried | None:
    """Return the tower and projector of the files that a run started from, or of the model itself; None without any."""
    files = first_files(source)
    return None if files is None else external.open_external_weights(files).carried


def describe_initial_files(source: str | Path, trains_tower: bool = False) -> list[str]:
    """Describe, in a line each, what of the files that a run starts from is not trained.

    Args:
        source: `init_from` of the run. Without its weights, such as on a machine that only plans, nothing is said.
        trains_tower: whether the run trains modules of a tower or its projector.
    """
    outcome = "are not trained; exports carry them unchanged"
    if trains_tower:
        outcome = "are trained where the config names their modules; exports have them as trained"
    files = first_files(source)
    if files is None or not external.has_weights(files):
        return []
    lines: list[str] = []
    if chosen := external.describe_choice(files):
        lines.append(chosen)
    carried = carried_of(files)
    if carried is not None:
        lines.append(f"{carried.description} of {files} {outcome} (--text-only leaves them out)")
    return lines
