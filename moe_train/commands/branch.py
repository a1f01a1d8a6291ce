"""`moe-train branch`: a new run that continues from a checkpoint of another one, such as the decay of a WSD schedule."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, survey
from moe_train.checkpoint.runs import is_run, named_checkpoint, named_step, steps_in_words
from moe_train.machine.files import new_directory, refuse_existing
from moe_train.run.averaging import AVERAGE_FOLDER


def branch(directory: Path, run_dir: Path) -> int:
    """Copy a run up to one of its checkpoints into a new folder.

    A run with this folder as its `run_dir` continues after that step, optimizer state and position in the data included, with the
    settings of its own config: another number of steps, schedule or learning rate. The original run stays as it is.

    Args:
        directory: the run, with the checkpoint: `RUN@STEP`; `RUN` alone means the newest.
        run_dir: the folder to create.

    Returns:
        The step of the checkpoint.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        FileExistsError: `run_dir` exists.
    """
    source = named_checkpoint(directory).run_dir
    if not is_run(source):
        raise FileNotFoundError(f"{directory} is no run with checkpoints; name RUN@STEP")
    refuse_existing(run_dir)
    readable = survey(source).readable
    step = named_step(directory)
    if step is None:
        # The survey lists the newest first.
        step = next(iter(readable), None)
    if step is None or step not in readable:
        raise FileNotFoundError(f"{source} has no checkpoint of step {step} that can be read; it has {steps_in_words(readable)}")
    with new_directory(run_dir) as unfinished:
        _copy_up_to(source, unfinished, step)
    return step


def _copy_up_to(source: Path, target: Path, step: int) -> None:
    """Copy the files of a run, and of its checkpoints the one of `step`; the average of its weights is such a run, too."""
    for path in source.iterdir():
        # Hidden files are locks.
        if path.name == CHECKPOINTS_FOLDER or path.name.startswith("."):
            continue
        if path.name == AVERAGE_FOLDER:
            (target / path.name).mkdir()
            _copy_up_to(path, target / path.name, step)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)
    checkpoint = source / CHECKPOINTS_FOLDER / str(step)
    if checkpoint.is_dir():
        shutil.copytree(checkpoint, target / CHECKPOINTS_FOLDER / str(step))
