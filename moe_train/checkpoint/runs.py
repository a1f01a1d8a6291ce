"""Whether a directory is a run, and the config that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.manager import FOLDER
from moe_train.config.faults import in_words

TOKENIZER = "tokenizer"
"""The folder of a run with its tokenizer's files."""


def is_run(directory: str | Path) -> bool:
    """Whether the directory is one of our runs."""
    return (Path(directory) / FOLDER).is_dir()


def run_config(run_dir: str | Path) -> config.Config:
    """The resolved config of a run's newest checkpoint; `model` is always stated.

    Raises FileNotFoundError where the run has no checkpoint.
    """
    with manager.reading(run_dir) as checkpoints:
        about = manager.newest(checkpoints)
    if about is None:
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet that can be read")
    return saved_config(about.config, run_dir)


def saved_config(fields: dict[str, Any], run_dir: str | Path) -> config.Config:
    """The config that a checkpoint holds. Raises ValueError in one line where another version wrote keys that are none here."""
    try:
        return config.Config.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        path, message = next(in_words(error, fields))
        key = ".".join(map(str, path))
        raise ValueError(
            f"{run_dir} was saved by another version of moe_train: {key}: {message}; use that version for it, or start anew"
        ) from error
