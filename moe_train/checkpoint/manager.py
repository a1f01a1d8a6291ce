"""A run's own state on disk, through Orbax: what a checkpoint contains, which ones are kept, and how state is restored.

    RUN_DIR/checkpoints/STEP/params       the trainable weights, and the routers' biases
                             optimizer    the optimizer state, and the numbers of steps tried and skipped
                             about        JSON: `CheckpointMetadata`, the bit sums of the arrays, the held-out loss, and a hash

For frozen weights a checkpoint holds only their source and hashes. A checkpoint appears completely or not at all (Orbax
renames it into place), is written while training continues, and can be restored on any mesh.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from moe_train import config
from moe_train.checkpoint.arrays import add_part, bit_sums, chunked_save_args, read_array, read_in_parts, stored_names
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER as CHECKPOINTS_FOLDER
from moe_train.checkpoint.metadata import CheckpointMetadata as CheckpointMetadata
from moe_train.checkpoint.metadata import SavedCheckpoint, about_json, read_saved, survey
from moe_train.checkpoint.metadata import WeightOrigin as WeightOrigin
from moe_train.machine.agreement import exchange
from moe_train.model.parameters import Parameters
from moe_train.train.state import TrainState, split_buffers
from moe_train.weights.arrays import Abstract

log = logging.getLogger(__name__)


def params_of(state: TrainState) -> Any:
    """Return the part of the state that a checkpoint stores as `params`."""
    return state.learned


def optimizer_of(state: TrainState) -> Any:
    """Return the part of the state that a checkpoint stores as `optimizer`."""
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}


# --- saving --------------------------------------------------------------------------------------------------------


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
            losses = {step: _loss_or_inf(metrics) for step in steps if (metrics := self.metrics(step))}
            if losses and math.isfinite(min(losses.values())):
                # Of equal losses Orbax keeps the newest.
                kept.add(min(reversed(losses), key=losses.__getitem__))
        for step in steps:
            if step not in kept:
                self.delete(step)

    def metrics(self, step: int) -> dict[str, float | None] | None:
        """Return the held-out loss of a checkpoint; None if its metadata cannot be read."""
        try:
            return {"held_out_loss": read_saved(Path(self.directory) / str(step)).held_out_loss}
        except (OSError, ValueError):  # `restore` names the file
            return None


def _manager(run_dir: str | Path, settings: config.Checkpoint) -> ocp.CheckpointManager:
    """Create Orbax's manager, which keeps the last `keep_last` checkpoints and, with `keep_best`, the one with the best loss."""
    # Never fewer than two: weights can be ruined although their save succeeds, which only the steps after it show. With
    # `keep_last` 1 the older one goes when the next save begins, so the disk holds no more at its peak.
    keep: list[PreservationPolicy] = [LatestN(max(2, settings.keep_last))]
    if settings.keep_best:
        # Descending, since BestN keeps the last of the sorted checkpoints.
        best = BestN(get_metric_fn=_loss_or_inf, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=_loss_or_inf,  # Orbax keeps metrics in memory only if this is set
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


def _loss_or_inf(metrics: Mapping[str, float | None]) -> float:
    """Return the held-out loss of a checkpoint; infinite if it was not measured."""
    loss = metrics["held_out_loss"]
    return math.inf if loss is None else loss


def best_loss(checkpoints: ocp.CheckpointManager) -> float:
    """Return the lowest held-out loss among the checkpoints on disk; infinite if none has one."""
    measured = (checkpoints.metrics(step) for step in checkpoints.all_steps())
    return min((_loss_or_inf(metrics) for metrics in measured if metrics), default=math.inf)


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
    metrics = {"held_out_loss": held_out_loss}
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
    return RuntimeError(f"could not save a checkpoint in {checkpoints.directory}: {_brief(error)}; {previous}")


def _brief(error: BaseException) -> str:
    """Return the text of an error in one line of about 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= 200:
        return text
    # Long texts name the operating system's reason last, after paths and settings.
    reasons = [reason for reason in _REASONS if reason in text[200:]]
    return f"{text[:200]} … {''.join(reasons)}".rstrip()


_REASONS = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system", "Input/output error")
"""Reasons of the operating system for which a save fails."""


# --- restoring -----------------------------------------------------------------------------------------------------


def on_current_mesh(abstract: Any) -> Any:
    """Convert shapes from `jax.eval_shape` to shapes whose shardings name the concrete mesh in force, with its devices."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return the same shape on the concrete mesh."""
        spec = P() if x.sharding is None else x.sharding.spec  # scalars of the optimizer state have no sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


def newest_metadata(run_dir: str | Path) -> CheckpointMetadata | None:
    """Return the metadata of the newest checkpoint whose metadata can be read; None if there is none.

    Every process of the job must call this.
    """
    for saved in survey(run_dir).readable.values():
        return saved.about
    return None


class _Attempt(NamedTuple):
    """The outcome of reading arrays in this process."""

    fault: str
    """Why they cannot be read; empty if they were read."""
    sums: list[int]
    """This process's shares of their bit sums."""


def _fault_of_any(attempt: _Attempt, expected: list[int], item: str) -> str:
    """Return why any process could not read the arrays of an item, or how their bit sums differ; empty if all is well.

    All processes get the same answer, so that they take the same checkpoint, and none waits for another in a collective.
    """
    # JSON turns the named tuple into a list of its fields.
    answers = [_Attempt(*json.loads(text)) for text in exchange(json.dumps(attempt), f"on whether {item} can be read")]
    for index, answer in enumerate(answers):
        if answer.fault:
            return answer.fault if len(answers) == 1 else f"{answer.fault} (process {index})"
    # Every process has a share of every array here, since an attempt with a fault has returned above.
    totals = [sum(shares) % 2**32 for shares in zip(*(answer.sums for answer in answers), strict=True)]
    if totals != expected:
        return f"{item} is damaged: the bit sums of its arrays differ from those saved"
    return ""


PartConverters = Mapping[str, Callable[[jax.Array], Parameters]]
"""Path of an array -> a function that converts a part of the array (along its first dim) to that part of what is kept of it,
such as its quantized values and scales.
"""


class LoadedParams(NamedTuple):
    """The trainable weights of a run, and the checkpoint that they are from."""

    params: Parameters
    about: CheckpointMetadata
    step: int


def load_params(
    run_dir: str | Path, abstract: Abstract, step: int | None = None, keep: PartConverters | None = None
) -> LoadedParams:
    """Load the trainable weights of a run onto the mesh in force; every process of the job must call this.

    The newest checkpoint that can be read is used. Passing over a damaged one is logged, and nothing is renamed.

    Args:
        run_dir: The run.
        abstract: Shapes, dtypes and shardings of all arrays of the checkpoint.
        step: The step of the checkpoint to read; None for the newest.
        keep: The only arrays to read, and what to keep of each, so that an array never has to be in memory as a whole; None to
            read all of them. Arrays are read one after the other.

    Raises:
        FileNotFoundError: If there is no checkpoint (of `step`).
        RuntimeError: If no checkpoint can be read.
    """
    readable, damaged = survey(run_dir)
    steps = sorted({*readable, *damaged}, reverse=True)
    if not steps:
        raise FileNotFoundError(f"{run_dir} has no checkpoint")
    if step is not None:
        if step not in steps:
            raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, reversed(steps)))}")
        steps = [step]
    other_steps = [step for step in readable if step not in steps]
    for candidate in steps:
        fault = damaged.get(candidate, "")
        if not fault:
            saved = readable[candidate]
            params = Path(run_dir) / CHECKPOINTS_FOLDER / str(candidate) / "params"
            loaded, fault = _load_array_by_array(params, saved, abstract, keep)
        if not fault:
            _log_choice(run_dir, candidate, readable)
            return LoadedParams(loaded, saved.about, candidate)
        message = f"the checkpoint of step {candidate} in {run_dir} cannot be read: {fault}"
        if other_steps:
            message += f"; restore it, or name another one, such as {run_dir}@{other_steps[0]}"
        log.warning("%s", message)
    raise RuntimeError(message)


def _log_choice(run_dir: str | Path, step: int, readable: Mapping[int, SavedCheckpoint]) -> None:
    """Say which checkpoint was taken, and how to name another one with a lower held-out loss."""
    newest = max(readable)
    age = "the newest" if step == newest else f"the newest is that of step {newest}"
    loss = readable[step].held_out_loss
    measured = {other: saved.held_out_loss for other, saved in readable.items() if saved.held_out_loss is not None}
    best = min(measured, key=measured.__getitem__, default=step)
    quality = "" if loss is None else f"; held-out loss {loss:.4f}"
    if best != step:
        quality += f"; the lowest is that of step {best}, {measured[best]:.4f} ({run_dir}@best)"
    log.info("weights of %s: the checkpoint of step %d (%s%s)", run_dir, step, age, quality)


def _load_array_by_array(
    params: Path, saved: SavedCheckpoint, abstract: Abstract, keep: PartConverters | None
) -> tuple[Parameters, str]:
    """Read the arrays of `abstract` one after the other, in parts, and verify their bit sums.

    Returns:
        The arrays, or what `keep` keeps of them; and why they cannot be used, on which all processes agree (empty if they can).
    """
    # The sums are stored in the order of the sorted paths, which is the order of the leaves of a dict in JAX.
    stored_paths = sorted(abstract)
    if len(stored_paths) != len(saved.sums["params"]):
        return {}, f"{params} has {len(saved.sums['params'])} arrays, but {len(stored_paths)} are expected"
    sums = dict(zip(stored_paths, saved.sums["params"], strict=True))
    loaded: Parameters = {}
    totals: list[int] = []
    paths = list(abstract if keep is None else keep)
    fault = ""
    try:
        for path in paths:
            kept, total = _load_in_parts(params, path, abstract[path], None if keep is None else keep[path])
            totals.append(total)
            loaded |= kept
    except Exception as error:  # any error counts as damage: it depends on which byte is wrong
        fault = f"{params}: {_brief(error)}"
    return loaded, _fault_of_any(_Attempt(fault, totals), [sums[path] for path in paths], str(params))


def _load_in_parts(params: Path, path: str, like: Any, keep: Callable[[jax.Array], Parameters] | None) -> tuple[Parameters, int]:
    """Read an array in parts; returns it, or what `keep` keeps of it, and this process's share of its bit sum."""
    collected: Parameters = {}
    total = 0
    for start, part, bit_sum in read_in_parts(params, path, on_current_mesh(like)):
        total += bit_sum
        # One part can become several arrays, such as quantized values and scales.
        converted = {path: part} if keep is None else keep(part)
        for name, x in converted.items():
            collected[name] = add_part(collected.get(name), x, start, like.shape[0])
        del part, converted
        jax.block_until_ready(collected)  # the next part may need the memory of this one
    return collected, total


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
            _set_aside(checkpoints, {number: f"damaged-{number}" for number in damaged})
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
            fault = f"{checkpoint / item}: {_brief(error)}"
        fault = _fault_of_any(_Attempt(fault, sums), saved.sums[item], str(checkpoint / item))
        if fault:
            return abstract, fault
        trees[item] = jax.tree.unflatten(structure, arrays)
    trainable, buffers = split_buffers(trees["params"])
    return TrainState(trainable=trainable, buffers=buffers, frozen={}, **trees["optimizer"]), ""


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
        finish_saving(checkpoints)
        _set_aside(checkpoints, {step: f"unusable-{step}"})
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
        _set_aside(checkpoints, {step: f"spike-{step}" for step in {*readable, *damaged} if step > target})
    return target


def _set_aside(checkpoints: ocp.CheckpointManager, names: Mapping[int, str]) -> None:
    """Rename checkpoints, {step: new name}; one process does it, and all processes reload the list of steps."""
    if jax.process_index() == 0:
        for step, name in names.items():
            renamed = checkpoints.directory / name
            shutil.rmtree(renamed, ignore_errors=True)  # left by an earlier restore of the same step
            with contextlib.suppress(FileNotFoundError):  # this process does not see it; another one does
                (checkpoints.directory / str(step)).rename(renamed)
    exchange("", "on the checkpoints that are left")  # the first process has renamed them
    checkpoints.reload()
