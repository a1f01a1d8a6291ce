"""Average the weights of a run, and save the average as a run of its own: RUN_DIR/average.

Its checkpoints have the steps of the run's, so that RUN_DIR/average is evaluated, exported and named (`RUN_DIR/average@30`) like
any run. It is saved before the run's own checkpoint, so that a run that continues always finds the average of its step.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.load_params import load_params
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, CheckpointMetadata, survey
from moe_train.machine.agreement import exchange
from moe_train.model.parameters import Parameters
from moe_train.train.state import TrainState, split_buffers

AVERAGE_FOLDER = "average"
"""The folder of a run that holds its averaged weights, as a run of its own."""


class WeightAverage:
    """The average of a run's weights, which `open_average` makes."""

    def __init__(self, settings: config.Average, checkpoints: ocp.CheckpointManager, run_dir: Path, average: Parameters) -> None:
        self._settings = settings
        self._checkpoints = checkpoints
        self._run_dir = run_dir
        self._average = average

    def after_step(self, state: TrainState) -> None:
        """Take the weights after a step into the moving average. A skipped step leaves the weights, and counts all the same."""
        if isinstance(self._settings, config.ExponentialAverage):
            self._average = _moved(self._average, state.trainable, self._settings.decay)

    def save(self, step: int, state: TrainState, about: CheckpointMetadata) -> None:
        """Save the average after `step`, and wait until it is on disk.

        Raises:
            RuntimeError: It could not be written.
        """
        average = self._average
        if isinstance(self._settings, config.LastCheckpoints):
            average = self._mean_of_last(self._settings.count, step, state)
        # Without the optimizer's moments, which belong to the run itself.
        averaged = state._replace(trainable=average, opt_state=())
        manager.save(self._checkpoints, step, averaged, about)
        manager.finish_saving(self._checkpoints)

    def _mean_of_last(self, count: int, step: int, state: TrainState) -> Parameters:
        """Return the mean of these weights and those of the last checkpoints before them."""
        earlier = [other for other in survey(self._run_dir).readable if other < step][: count - 1]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.learned)
        total = jax.tree.map(jnp.copy, state.trainable)
        for other in earlier:
            weights, _ = split_buffers(load_params(self._run_dir, shapes, other, announce=False).params)
            total = jax.tree.map(jnp.add, total, weights)
        return jax.tree.map(lambda x: x / (len(earlier) + 1), total)


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def _moved(average: Parameters, weights: Parameters, decay: float) -> Parameters:
    """Return the average, moved towards the weights."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, weights)


@contextlib.contextmanager
def open_average(run: config.Run, state: TrainState) -> Iterator[WeightAverage | None]:
    """Open the average of a run for writing, as a context manager; None if the run keeps no average.

    Args:
        run: The resolved run.
        state: The state that training continues from.

    Raises:
        ValueError: The average could not be continued exactly, since the weights are not in float32.
    """
    settings = run.average
    if isinstance(settings, config.NoAverage):
        yield None
        return
    coarse = next((path for path, x in state.trainable.items() if x.dtype != jnp.float32), None)
    if coarse is not None:
        raise ValueError(
            f"average.name {settings.name} needs weights in float32, whose small changes count, and {coarse} is "
            f"{state.trainable[coarse].dtype}; set compute.param_dtype to float32, or leave average out"
        )
    folder = Path(run.run_dir) / AVERAGE_FOLDER
    start = int(state.step)
    _remove_later(folder / CHECKPOINTS_FOLDER, start)
    average: Parameters = {}
    if isinstance(settings, config.ExponentialAverage):
        average = jax.tree.map(jnp.copy, state.trainable)
    if average and start in survey(folder).readable:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.learned)
        average, _ = split_buffers(load_params(folder, shapes, start, announce=False).params)
    kept = run.checkpoint.model_copy(update={"keep_best": False})
    with manager.open_for_saving(folder, kept) as checkpoints:
        yield WeightAverage(settings, checkpoints, Path(run.run_dir), average)


def _remove_later(folder: Path, start: int) -> None:
    """Remove averages after the step that training continues from; those steps are done again."""
    if jax.process_index() == 0 and folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.isdecimal() and int(entry.name) > start:
                shutil.rmtree(entry)
    exchange("", "on the averages that are left")
