"""Decide when a run saves a checkpoint, and what the checkpoint records about itself."""

from __future__ import annotations

import time

import orbax.checkpoint as ocp

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.manager import CheckpointMetadata
from moe_train.run.inputs import RunInputs
from moe_train.run.start import Start
from moe_train.train.state import TrainState


class Saving:
    """Save every so many steps and minutes, at the end, and when the held-out loss is the best so far."""

    def __init__(self, run: config.Run, checkpoints: ocp.CheckpointManager, begin: Start, inputs: RunInputs) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._begin = begin
        self._inputs = inputs
        self._best = manager.best_loss(checkpoints)
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """Return whether `checkpoint.every_minutes` have passed since the last save."""
        minutes = self._run.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def is_due(self, step: int) -> bool:
        """Return whether the state is always saved after `step`: every `checkpoint.every_steps` steps and after the last one."""
        return step % self._run.checkpoint.every_steps == 0 or step == self._inputs.total_steps

    def is_best(self, held_out_loss: float | None) -> bool:
        """Return whether the loss is the lowest so far and best checkpoints are kept; it then becomes the loss to beat.

        Args:
            held_out_loss: None if it was not measured.
        """
        # `not <` rather than `>=`, so that a NaN is never the best.
        if held_out_loss is None or not self._run.checkpoint.keep_best or not held_out_loss < self._best:
            return False
        self._best = held_out_loss
        return True

    def save(self, step: int, state: TrainState, held_out_loss: float | None) -> None:
        """Start an asynchronous save. Raises RuntimeError if this save or the previous one could not be written."""
        loader = self._inputs.train
        about = CheckpointMetadata(
            config=self._run.to_config().model_dump(mode="json"),
            row=step * self._run.train.batch_size,
            data=loader.identity,
            base=self._begin.base,
            manifest=loader.manifest_hash,
            adapter=self._begin.adapter,
        )
        manager.save(self._checkpoints, step, state, about, held_out_loss)
        self._saved_at = time.monotonic()

    def check(self) -> None:
        """Raise RuntimeError if the save in progress has already failed; does not wait for it."""
        manager.check_saving(self._checkpoints)

    def finish(self) -> None:
        """Wait for the save in progress. Raises RuntimeError if it failed."""
        manager.finish_saving(self._checkpoints)
