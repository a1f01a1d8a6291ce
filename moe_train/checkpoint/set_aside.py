"""Rename checkpoints from which a run cannot or should not continue, so that an older one is the newest."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from moe_train.checkpoint import manager
from moe_train.checkpoint.metadata import survey
from moe_train.machine.agreement import exchange


def set_unusable_aside(checkpoints: ocp.CheckpointManager, step: int) -> int | None:
    """Rename the checkpoint of `step` to `unusable-STEP` if there is an older one that can be read.

    Every process of the job must call this.

    Returns:
        The step of that older checkpoint; None if there is none, and nothing was renamed.
    """
    folder = Path(checkpoints.directory)
    # Survey reads all metadata, so an older checkpoint that is damaged does not count.
    older = max((other for other in survey(folder.parent).readable if other < step), default=None)
    if older is not None:
        manager.finish_saving(checkpoints)
        set_aside(checkpoints, {step: f"unusable-{step}"})
    return older


def set_newer_aside(checkpoints: ocp.CheckpointManager, newest: int, every_steps: int) -> int | None:
    """Rename the checkpoints after the newest one that can be read, at a multiple of `every_steps` up to `newest`.

    They are called `spike-STEP` then. Every process of the job must call this.

    Returns:
        The step of that checkpoint; None if there is none, and nothing was renamed.
    """
    readable, damaged = survey(Path(checkpoints.directory).parent)
    target = max((step for step in readable if step <= newest and step % every_steps == 0), default=None)
    if target is not None:
        set_aside(checkpoints, {step: f"spike-{step}" for step in {*readable, *damaged} if step > target})
    return target


def set_aside(checkpoints: ocp.CheckpointManager, names: Mapping[int, str]) -> None:
    """Rename checkpoints, {step: new name}; one process does it, and all processes reload the list of steps."""
    if jax.process_index() == 0:
        for step, name in names.items():
            renamed = checkpoints.directory / name
            shutil.rmtree(renamed, ignore_errors=True)  # left by an earlier restore of the same step
            with contextlib.suppress(FileNotFoundError):  # this process does not see it; another one does
                (checkpoints.directory / str(step)).rename(renamed)
    exchange("", "on the checkpoints that are left")  # the first process has renamed them
    checkpoints.reload()
