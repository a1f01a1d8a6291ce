"""Restore the state of a run from its newest checkpoint that can be read, on any mesh."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from moe_train.checkpoint.arrays import read_array, stored_names
from moe_train.checkpoint.items import optimizer_of, params_of
from moe_train.checkpoint.metadata import CheckpointMetadata, SavedCheckpoint, survey
from moe_train.checkpoint.reading import ReadOutcome, fault_of_any, on_current_mesh, short_reason
from moe_train.checkpoint.set_aside import set_aside
from moe_train.train.state import TrainState, split_buffers

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A restored state without its frozen weights."""

    state: TrainState
    """The state; `frozen` is empty."""
    about: CheckpointMetadata
    """The metadata of the checkpoint."""
    damaged: dict[int, str]
    """Step -> error for the newer checkpoints that could not be read."""
    held_out_loss: float | None = None
    """Held-out loss at this step; None if it was not measured."""


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState) -> Restored | None:
    """Restore the newest checkpoint that can be read completely, on the mesh in force.

    A newer checkpoint that cannot be read is damaged: it is renamed to `damaged-STEP` and listed under `damaged`, so that the
    caller can report it.

    Args:
        checkpoints: The checkpoints of the run.
        abstract: Shapes, dtypes and shardings of the state.

    Returns:
        The restored state; None if there is no checkpoint.

    Raises:
        RuntimeError: If there are checkpoints and none can be read; nothing is renamed then.
    """
    folder = Path(checkpoints.directory)
    readable, damaged_metadata = survey(folder.parent)
    damaged: dict[int, str] = {}
    for step in sorted({*readable, *damaged_metadata}, reverse=True):
        # Its arrays are not read: without the metadata there is nothing to compare them with.
        if step in damaged_metadata:
            damaged[step] = damaged_metadata[step]
            continue
        state, fault = _restore_arrays(folder / str(step), readable[step], abstract)
        if fault:
            damaged[step] = fault
            continue
        for older in damaged_metadata.keys() - damaged.keys():
            log.warning("the checkpoint of step %d is damaged and is passed over: %s", older, damaged_metadata[older])
        if damaged:
            set_aside(checkpoints, {number: f"damaged-{number}" for number in damaged})
        return Restored(state, readable[step].about, damaged, readable[step].held_out_loss)
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise RuntimeError(
            f"no checkpoint in {folder} can be read; the newest, of step {step}: {reason}; restore the files, or start again in "
            "another run_dir"
        )
    return None


def _restore_arrays(checkpoint: Path, saved: SavedCheckpoint, abstract: TrainState) -> tuple[TrainState, str]:
    """Read the state of a checkpoint without its frozen weights, on the mesh in force, and verify its bit sums.

    Returns:
        The state, and why it cannot be used, on which all processes agree (empty if it can).
    """
    trees: dict[str, Any] = {}
    for item, tree in (("params", params_of(abstract)), ("optimizer", optimizer_of(abstract))):
        leaves, structure = jax.tree.flatten(on_current_mesh(tree))
        arrays: list[jax.Array] = []
        sums: list[int] = []
        fault = ""
        try:
            for name, like in zip(stored_names(tree), leaves, strict=True):
                part = read_array(checkpoint / item, name, like)
                arrays.append(part.array)
                sums.append(part.bit_sum)
        except Exception as error:  # any error counts as damage: it depends on which byte is wrong
            fault = f"{checkpoint / item}: {short_reason(error)}"
        fault = fault_of_any(ReadOutcome(fault, sums), saved.sums[item], str(checkpoint / item))
        if fault:
            return abstract, fault
        trees[item] = jax.tree.unflatten(structure, arrays)
    trainable, buffers = split_buffers(trees["params"])
    return TrainState(trainable=trainable, buffers=buffers, frozen={}, **trees["optimizer"]), ""
