"""The option `--step`, which chooses a checkpoint of a run as `RUN@STEP` does."""

from __future__ import annotations

from pathlib import Path

from moe_train.checkpoint.runs import is_run, named_checkpoint


def at_step(directory: Path, step: str | None) -> Path:
    """Return `RUN@STEP` for a run and the value of `--step`; the directory itself if none is stated.

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: The directory already names a checkpoint or is no run, or the step is no checkpoint's name.
    """
    if step is None:
        return directory
    if not is_run(directory):
        if not directory.exists():
            raise FileNotFoundError(f"{directory}: no such run; name the folder that run_dir states")
        raise ValueError(f"--step {step} chooses a checkpoint of a run, and {directory} is no run; leave --step out")
    if named_checkpoint(directory).which:
        raise ValueError(f"--step {step} and {directory} both name a checkpoint; keep one of them")
    chosen = Path(f"{directory}@{step}")
    named_checkpoint(chosen)  # raises ValueError for another word
    return chosen
