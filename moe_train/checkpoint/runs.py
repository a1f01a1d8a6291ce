"""Recognize the directory of a run, choose one of its checkpoints, and read the config that the run was trained with.

Where a run is expected, `RUN@30` names its checkpoint of step 30, `RUN@best` the one with the lowest held-out loss
(or the highest score, by `checkpoint.best_by`), and `RUN@newest` the newest; `RUN` alone is the newest as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from moe_train import config
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, CheckpointMetadata, survey
from moe_train.config.faults import explain_errors

TOKENIZER_FOLDER = "tokenizer"
"""The folder of a run that holds its tokenizer's files."""


class NamedCheckpoint(NamedTuple):
    """A run, and which of its checkpoints is meant."""

    run_dir: Path
    which: str
    """A step, `best` or `newest`; empty if nothing is stated, which means the newest."""


def named_checkpoint(directory: str | Path) -> NamedCheckpoint:
    """Split `RUN@WHICH`; a directory that exists under that very name, or that is no run, is taken as it is.

    Raises:
        ValueError: If WHICH is neither a step nor `best` nor `newest`.
    """
    path, _, which = str(directory).rpartition("@")
    # A folder whose own name has an @ takes precedence; a path without @ leaves `path` empty.
    if not path or Path(directory).exists() or not (Path(path) / CHECKPOINTS_FOLDER).is_dir():
        return NamedCheckpoint(Path(directory), "")
    if which not in ("best", "newest") and not re.fullmatch("[0-9]+", which):
        raise ValueError(f"{directory} names no checkpoint of {path}; state {path}@STEP, {path}@best or {path}@newest")
    return NamedCheckpoint(Path(path), which)


def run_folder(directory: str | Path) -> Path:
    """Return the folder of `RUN` or `RUN@WHICH`."""
    return named_checkpoint(directory).run_dir


def named_step(directory: str | Path) -> int | None:
    """Return the step that `RUN@WHICH` names; None for the newest checkpoint that can be read.

    Every process of the job must call this.

    Raises:
        FileNotFoundError: If `RUN@best` is named and no checkpoint has a held-out loss.
    """
    run_dir, which = named_checkpoint(directory)
    if which == "best":
        best = survey(run_dir).best()
        if best is None:
            raise FileNotFoundError(
                f"{directory}: no checkpoint of {run_dir} has a held-out loss, or the score that its checkpoint.best_by names; "
                f"state {run_dir}@STEP"
            )
        return best
    return int(which) if which.isdecimal() else None


def is_run(directory: str | Path) -> bool:
    """Return whether the directory is one of our runs."""
    return (run_folder(directory) / CHECKPOINTS_FOLDER).is_dir()


def read_run(run_dir: str | Path) -> config.Run:
    """Return the record of a run, from the named checkpoint or else its newest.

    Raises:
        FileNotFoundError: If the run has no such checkpoint, or none that can be read.
    """
    folder = run_folder(run_dir)
    readable, damaged = survey(folder)
    step = named_step(run_dir)
    if step is not None:
        if step in damaged:
            raise FileNotFoundError(f"the checkpoint of step {step} in {folder} cannot be read: {damaged[step]}")
        if step not in readable:
            raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; it has {steps_in_words(readable)}")
        return config.run_of(saved_config(folder, readable[step].about))
    for step, fault in damaged.items():
        if not readable:
            raise FileNotFoundError(f"{run_dir} has no checkpoint that can be read; the newest, of step {step}: {fault}")
    if not readable:
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet that can be read; wait for the first one")
    about = next(iter(readable.values())).about
    return config.run_of(saved_config(run_dir, about))


def steps_in_words(steps: Iterable[int]) -> str:
    """Return steps as a list for a message."""
    return ", ".join(map(str, sorted(steps))) or "none"


def saved_config(run_dir: str | Path, about: CheckpointMetadata) -> config.Config:
    """Return the config that a checkpoint was saved with, also if an older version of this package saved it.

    Args:
        run_dir: The run, for messages.
        about: The metadata of the checkpoint.

    Raises:
        ValueError: If the config states something that this version does not support.
    """
    try:
        return config.Config.model_validate_json(json.dumps(about.config))
    except ValidationError as error:
        path, message = next(explain_errors(error, about.config, config.Config))
        key = ".".join(str(part) for part in path)
        raise ValueError(
            f"{run_dir} was saved by another version of moe_train: {key}: {message}; use that version, or start a new run"
        ) from error
