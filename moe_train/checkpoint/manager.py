"""Saving a run's own state through Orbax: what a checkpoint contains, and which ones are kept.

    RUN_DIR/checkpoints/STEP/params       the trainable weights, and the routers' biases
                             optimizer    the optimizer state, and the numbers of steps tried and skipped
                             about        JSON: `CheckpointMetadata`, the bit sums of the arrays, the held-out loss, and a hash

For frozen weights a checkpoint holds only their source and hashes. A checkpoint appears completely or not at all (Orbax
renames it into place), is written while training continues, and can be restored on any mesh.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from moe_train import config
from moe_train.checkpoint.arrays import bit_sums, chunked_save_args
from moe_train.checkpoint.items import optimizer_of, params_of
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, CheckpointMetadata, about_json, rank_of, read_saved
from moe_train.checkpoint.reading import short_reason
from moe_train.train.state import TrainState

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_for_saving(run_dir: str | Path, settings: config.Checkpoint) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints of a run for writing, as a context manager.

    When the block ends, a save in progress is finished, or its error is raised. Nothing is written before the first save, not
    even the folder.
    """
    _remove_unfinished(Path(run_dir) / CHECKPOINTS_FOLDER)
    _silence_failed_writes()
    checkpoints = _manager(run_dir, settings)
    orbax_log = logging.getLogger("absl")
    # Orbax logs a traceback for a failed save; the error is raised here too, so the log line would repeat it.
    orbax_log.addFilter(_no_traceback)
    try:
        yield checkpoints
    except BaseException:
        with contextlib.suppress(Exception):  # the error that ended the block is the one to raise
            checkpoints.close()
        raise
    else:
        finish_saving(checkpoints)
        checkpoints.close()
    finally:
        orbax_log.removeFilter(_no_traceback)


# Once per process, since another call would wrap the hook of the first.
@functools.cache
def _silence_failed_writes() -> None:
    """Print no traceback, in this process, for the writes of a failed save that end after the first of them has failed.

    TensorStore's threads and asyncio print one for each array. The first error is raised where the save is waited for.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    usual_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        """Report an error that has no caller, except that of a closed event loop."""
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            usual_hook(unraisable)

    sys.unraisablehook = hook


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed save left behind. Orbax would do so in a thread, whose errors end the next save."""
    if jax.process_index() == 0:
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full


def _no_traceback(record: logging.LogRecord) -> bool:
    """Filter out errors that Orbax logs from its threads: they are raised again where the save is waited for."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Checkpoints(ocp.CheckpointManager):
    """Orbax's manager, except that a damaged file of metrics does not keep it from opening the other checkpoints."""

    keep_last = 2
    keep_best = False

    def delete_all_but_newest(self) -> None:
        """Delete all checkpoints but the newest, after which steps have been taken, and the best if it is kept."""
        self.wait_until_finished()
        steps = sorted(self.all_steps())
        kept = set(steps[-1:])
        if self.keep_best:
            ranks = {step: _rank_or_inf(metrics) for step in steps if (metrics := self.metrics(step))}
            if ranks and math.isfinite(min(ranks.values())):
                # Of equal ranks Orbax keeps the newest.
                kept.add(min(reversed(ranks), key=ranks.__getitem__))
        for step in steps:
            if step not in kept:
                self.delete(step)

    def metrics(self, step: int) -> dict[str, float | None] | None:
        """Return the rank of a checkpoint, as Orbax takes it; None if its metadata cannot be read."""
        try:
            return {"rank": read_saved(Path(self.directory) / str(step)).rank}
        except (OSError, ValueError):  # `restore` names the file
            return None


def _manager(run_dir: str | Path, settings: config.Checkpoint) -> ocp.CheckpointManager:
    """Create Orbax's manager, which keeps the last `keep_last` checkpoints and, with `keep_best`, the one with the best loss."""
    # Never fewer than two: weights can be ruined although their save succeeds, which only the steps after it show. With
    # `keep_last` 1 the older one goes when the next save begins, so the disk holds no more at its peak.
    keep: list[PreservationPolicy] = [LatestN(max(2, settings.keep_last))]
    if settings.keep_best:
        # Descending, since BestN keeps the last of the sorted checkpoints.
        best = BestN(get_metric_fn=_rank_or_inf, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=_rank_or_inf,  # Orbax keeps metrics in memory only if this is set
        best_mode="min",
        prevent_write_metrics=True,  # the metadata have them, and a hash over them
        # Nothing may be created before the first save; `save` creates the folder.
        create=False,
        save_root_metadata=False,
    )
    checkpoints = _Checkpoints((Path(run_dir) / CHECKPOINTS_FOLDER).absolute(), options=options)
    checkpoints.keep_last = settings.keep_last
    checkpoints.keep_best = settings.keep_best
    return checkpoints


def _rank_or_inf(metrics: Mapping[str, float | None]) -> float:
    """Return the rank of a checkpoint; infinite if what counts was not measured."""
    rank = metrics["rank"]
    return math.inf if rank is None else rank


def best_rank(checkpoints: ocp.CheckpointManager) -> float:
    """Return the lowest rank (see `metadata.rank_of`) among the checkpoints on disk; infinite if none was measured."""
    measured = (checkpoints.metrics(step) for step in checkpoints.all_steps())
    return min((_rank_or_inf(metrics) for metrics in measured if metrics), default=math.inf)


def save(
    checkpoints: ocp.CheckpointManager, step: int, state: TrainState, about: CheckpointMetadata, held_out_loss: float | None = None
) -> None:
    """Start saving the state; it may be donated as soon as this returns. Does nothing if `step` is already saved.

    Args:
        checkpoints: The checkpoints of the run.
        step: The step, which names the checkpoint.
        state: The state; its frozen weights are not saved.
        about: The metadata.
        held_out_loss: The held-out loss at this step; None if it was not measured. A loss that is not finite counts as None.

    Raises:
        RuntimeError: If this save or the one before it could not be written; earlier checkpoints stay intact.
    """
    if step in checkpoints.all_steps():
        return
    Path(checkpoints.directory).mkdir(parents=True, exist_ok=True)
    # NaN is no JSON, and comparing it would leave the choice of the best to chance.
    if held_out_loss is not None and not math.isfinite(held_out_loss):
        held_out_loss = None
    arrays = {"params": params_of(state), "optimizer": optimizer_of(state)}
    # Before this function returns, since the caller may donate the state to the next step.
    sums = {item: bit_sums(tree) for item, tree in arrays.items()}
    args = ocp.args.Composite(
        about=ocp.args.JsonSave(about_json(about, sums, held_out_loss)),
        **{item: ocp.args.StandardSave(tree, chunked_save_args(tree)) for item, tree in arrays.items()},
    )
    metrics = {"rank": rank_of(about, held_out_loss)}
    try:
        if isinstance(checkpoints, _Checkpoints) and checkpoints.keep_last == 1:
            checkpoints.delete_all_but_newest()
        # Forced, since the caller has decided to save; Orbax would ask its own policy whether the step is due.
        checkpoints.save(step, args=args, metrics=metrics, force=True)
    except Exception as error:
        raise _save_error(checkpoints, error) from error


def finish_saving(checkpoints: ocp.CheckpointManager) -> None:
    """Wait for the save in progress. Raises RuntimeError as `save` does."""
    try:
        checkpoints.wait_until_finished()
    except Exception as error:
        raise _save_error(checkpoints, error) from error


def check_saving(checkpoints: ocp.CheckpointManager) -> None:
    """Raise RuntimeError, as `save` does, if the save in progress has already failed; does not wait."""
    try:
        checkpoints.check_for_errors()
    except Exception as error:
        raise _save_error(checkpoints, error) from error


def _save_error(checkpoints: ocp.CheckpointManager, error: Exception) -> RuntimeError:
    """Remove what a failed save left behind, and return the error to raise."""
    if jax.process_index() == 0:
        for _ in range(20):  # one of several writers has failed; the others may still be writing
            _remove_unfinished(Path(checkpoints.directory))
            time.sleep(0.05)
            if not any(checkpoints.directory.glob("*.orbax-checkpoint-tmp*")):
                break
    checkpoints.reload()
    last = checkpoints.latest_step()
    previous = "there is no earlier checkpoint" if last is None else f"the checkpoint of step {last} is intact"
    return RuntimeError(f"could not save a checkpoint in {checkpoints.directory}: {short_reason(error)}; {previous}")
