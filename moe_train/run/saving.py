"""Decide when a run saves a checkpoint, and what the checkpoint records about itself."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_train import config
from moe_train.checkpoint import manager, set_aside
from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.model.parameters import Parameters
from moe_train.run.averaging import WeightAverage
from moe_train.run.inputs import RunInputs
from moe_train.run.start import Start
from moe_train.train.spike_guard import guard_to_json
from moe_train.train.state import TrainState


class UnusableCheckpoint(Exception):
    """The first step after a resume was not finite, and the run can start from an older checkpoint."""


@jax.jit
def _are_usable(weights: Parameters) -> jax.Array:
    """Return whether the norm of the weights is finite in float32; norms and products of larger weights are not."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(weights)]
    return jnp.all(jnp.isfinite(jnp.stack(squares)))


class RolledBack(Exception):
    """A step was a spike, and the run continues from an older checkpoint with the data after the spike."""

    def __init__(self, spike_step: int, spikes: int, checkpoint_step: int) -> None:
        super().__init__(
            f"step {spike_step} was a spike (number {spikes}): back to the checkpoint of step {checkpoint_step}, continuing with "
            f"the data after step {spike_step}"
        )
        self.spike_step = spike_step
        self.spikes = spikes


class Saving:
    """Save every so many steps and minutes, at the end, and when the held-out loss is the best so far."""

    def __init__(
        self,
        run: config.Run,
        checkpoints: ocp.CheckpointManager,
        begin: Start,
        inputs: RunInputs,
        average: WeightAverage | None = None,
    ) -> None:
        self._average = average
        self._run = run
        self._checkpoints = checkpoints
        self._begin = begin
        self._inputs = inputs
        self._resumed_step = begin.checkpoint_step
        self._best = manager.best_rank(checkpoints)
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """Return whether `checkpoint.every_minutes` have passed since the last save."""
        minutes = self._run.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def is_due(self, step: int) -> bool:
        """Return whether the state is always saved after `step`: every `checkpoint.every_steps` steps and after the last one."""
        return step % self._run.checkpoint.every_steps == 0 or step == self._inputs.total_steps

    def is_best(self, held_out_loss: float | None, suite_scores: Mapping[str, float] | None = None) -> bool:
        """Return whether these are the best figures so far and best checkpoints are kept; they then are those to beat.

        Args:
            held_out_loss: None if it was not measured.
            suite_scores: the score on each suite; None if they were not measured.
        """
        best_by = self._run.checkpoint.best_by
        rank = held_out_loss
        if best_by != "loss":
            rank = None if suite_scores is None else -suite_scores[best_by]
        # `not <` rather than `>=`, so that a NaN is never the best.
        if rank is None or not self._run.checkpoint.keep_best or not rank < self._best:
            return False
        self._best = rank
        return True

    def save(
        self, step: int, state: TrainState, held_out_loss: float | None, suite_scores: Mapping[str, float] | None = None
    ) -> None:
        """Start an asynchronous save.

        Raises:
            RuntimeError: the weights cannot be used, or this save or the previous one could not be written.
        """
        # Checked before every save, since a checkpoint that no step can be taken from would replace a good one.
        if not bool(_are_usable(state.learned)):
            raise RuntimeError(
                f"the weights after step {step} are not finite, or too large for another step, so they were not saved; lower "
                "optimizer.learning_rate, and start again from the last checkpoint"
            )
        loader = self._inputs.train
        about = CheckpointMetadata(
            config=self._run.to_config().model_dump(mode="json"),
            # The position in the global order of rows, which does not depend on the number of processes.
            row=step * self._run.train.batch_size,
            data=loader.identity,
            base=self._begin.base,
            manifest=loader.manifest_hash,
            adapter=self._begin.adapter,
            tokenizer=self._inputs.tokenizer.identity,
            guard=None if state.guard is None else guard_to_json(state.guard),
            suite_scores=None if suite_scores is None else dict(suite_scores),
        )
        if self._average is not None:
            # A checkpoint that is still being written would be missing from a mean of the last ones.
            manager.finish_saving(self._checkpoints)
            self._average.save(step, state, about)
        manager.save(self._checkpoints, step, state, about, held_out_loss)
        self._saved_at = time.monotonic()

    def fall_back(self) -> None:
        """Set aside the checkpoint that this run started from, since no step can be taken from it.

        Nothing happens if the run started from no checkpoint, or there is none before it.

        Raises:
            UnusableCheckpoint: the checkpoint was renamed; an older one is the newest now.
        """
        step = self._resumed_step
        # Without an older one the checkpoint is kept: it is all that there is.
        older = None if step is None else set_aside.set_unusable_aside(self._checkpoints, step)
        if older is not None:
            raise UnusableCheckpoint(
                f"the first step after the checkpoint of step {step} is not finite, so the checkpoint was renamed to "
                f"unusable-{step}; continuing from step {older}"
            )

    def roll_back(self, spike_step: int, spikes: int) -> None:
        """Make the newest checkpoint far enough before a spike the newest of all, by renaming those after it.

        Every process of the job must call this. Nothing happens if there is no such checkpoint: the spike is only skipped.

        Args:
            spike_step: the step of the spike.
            spikes: number of spikes so far.

        Raises:
            RolledBack: the run must start again from that checkpoint.
        """
        settings = self._run.train.spike_guard
        assert settings is not None
        self.finish()
        newest = spike_step - (settings.steps_back or 1)
        # Checkpoints at these steps only, so that saves by the clock or after a signal do not decide how the run goes on.
        target = set_aside.set_newer_aside(self._checkpoints, newest, self._run.checkpoint.every_steps)
        if target is not None:
            raise RolledBack(spike_step, spikes, target)

    def check(self) -> None:
        """Raise RuntimeError if the save in progress has already failed; does not wait for it."""
        manager.check_saving(self._checkpoints)

    def finish(self) -> None:
        """Wait for the save in progress. Raises RuntimeError if it failed."""
        manager.finish_saving(self._checkpoints)
