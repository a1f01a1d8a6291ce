"""Recognize the directory of a run, and read the config that the run was trained with."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from moe_train import config
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, CheckpointMetadata, survey
from moe_train.config.faults import explain_errors

TOKENIZER_FOLDER = "tokenizer"
"""The folder of a run that holds its tokenizer's files."""


def is_run(directory: str | Path) -> bool:
    """Return whether the directory is one of our runs."""
    return (Path(directory) / CHECKPOINTS_FOLDER).is_dir()


def read_run(run_dir: str | Path) -> config.Run:
    """Return the record of a run, from its newest checkpoint.

    Raises:
        FileNotFoundError: If the run has no checkpoint that can be read.
    """
    readable, damaged = survey(run_dir)
    for step, fault in damaged.items():
        if not readable:
            raise FileNotFoundError(f"{run_dir} has no checkpoint that can be read; the newest, of step {step}: {fault}")
    if not readable:
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet that can be read; wait for the first one")
    about = next(iter(readable.values())).about
    return config.run_of(saved_config(run_dir, about))


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
        path, message = next(explain_errors(error, about.config))
        key = ".".join(str(part) for part in path)
        raise ValueError(
            f"{run_dir} was saved by another version of moe_train: {key}: {message}; use that version, or start a new run"
        ) from error
