"""A run's own state on disk, through Orbax: what a checkpoint contains, which ones are kept, and how state is restored.

    RUN_DIR/checkpoints/STEP/params       the trainable weights, and the routers' biases
                             optimizer    the optimizer state, and the numbers of steps tried and skipped
                             about        JSON: `CheckpointMetadata`, and the bit sums of the arrays
                             metrics      JSON: the held-out loss, if it was measured at this step

For frozen weights a checkpoint holds only their source and hashes. A checkpoint appears completely or not at all (Orbax
renames it into place), is written while training continues, and can be restored on any mesh.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
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
from moe_train.checkpoint.arrays import add_part, bit_sums, chunked_save_args, read_in_parts
from moe_train.machine.files import JsonObject
from moe_train.model.parameters import Parameters
from moe_train.train.state import TrainState, split_buffers
from moe_train.weights.arrays import Abstract

log = logging.getLogger(__name__)
CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of a run that holds its checkpoints."""


class WeightOrigin(NamedTuple):
    """The origin of a run's initial weights: an external model's directory, or another run and the step of its checkpoint."""

    source: str
    """Path of the model or run."""
    step: int | None
    """Step of the run's checkpoint; None for an external model."""
    hashes: dict[str, str]
    """The sha256 of each tensor, or of each file of the checkpoint's weights."""


class CheckpointMetadata(NamedTuple):
    """The metadata of a checkpoint."""

    config: JsonObject
    """The resolved config: every default and the architecture are stated."""
    row: int
    """Number of rows of training data used so far: the position in the global order."""
    data: str
    """The loader's identity: a hash over everything that decides the batches."""
    base: WeightOrigin | None
    """The origin of the run's initial weights; None if they were random."""
    manifest: str | None = None
    """The hash over the manifests of the training data."""
    adapter: WeightOrigin | None = None
    """The origin of the initial adapters; None if they were newly initialized."""


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


def _no_traceback(record: logging.LogRecord) -> bool:
    """Filter out errors that Orbax logs from its threads: they are raised again where the save is waited for."""
    return not (record.exc_info and "orbax" in record.pathname)


def _manager(run_dir: str | Path, settings: config.Checkpoint) -> ocp.CheckpointManager:
    """Create Orbax's manager, which keeps the last `keep_last` checkpoints and, with `keep_best`, the one with the best loss."""
    keep: list[PreservationPolicy] = [LatestN(settings.keep_last)]
    if settings.keep_best:
        best = BestN(get_metric_fn=_loss_or_inf, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=_loss_or_inf,  # Orbax writes metrics only if this is set
        best_mode="min",
        create=False,
        cleanup_tmp_directories=(Path(run_dir) / CHECKPOINTS_FOLDER).exists(),
        save_root_metadata=False,
    )
    return ocp.CheckpointManager((Path(run_dir) / CHECKPOINTS_FOLDER).absolute(), options=options)


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
    metadata = about._asdict()
    for key in ("base", "adapter"):
        if metadata[key] is not None:
            metadata[key] = metadata[key]._asdict()
    arrays = {"params": params_of(state), "optimizer": optimizer_of(state)}
    sums = {item: bit_sums(tree) for item, tree in arrays.items()}
    args = ocp.args.Composite(
        about=ocp.args.JsonSave({"about": metadata, "sums": sums}),
        **{item: ocp.args.StandardSave(tree, chunked_save_args(tree)) for item, tree in arrays.items()},
    )
    if held_out_loss is not None and not math.isfinite(held_out_loss):
        held_out_loss = None
    metrics = {"held_out_loss": held_out_loss}
    try:
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
            for unfinished in checkpoints.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full
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
    if len(text) > 200:
        text = text[:200] + " …"
    return text


# --- restoring -----------------------------------------------------------------------------------------------------


def on_current_mesh(abstract: Any) -> Any:
    """Convert shapes from `jax.eval_shape` to shapes whose shardings name the concrete mesh in force, with its devices."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return the same shape on the concrete mesh."""
        spec = P() if x.sharding is None else x.sharding.spec  # scalars of the optimizer state have no sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


def newest_metadata(checkpoints: ocp.CheckpointManager) -> CheckpointMetadata | None:
    """Return the metadata of the newest checkpoint whose metadata can be read; None if there is none."""
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            return _read_metadata(checkpoints, step)
        except Exception:  # damaged: `restore` reports it, once an older checkpoint has proved readable
            continue
    return None


def _read_metadata(checkpoints: ocp.CheckpointManager, step: int) -> CheckpointMetadata:
    """Read the metadata of a checkpoint."""
    metadata = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about["about"]
    for key in ("base", "adapter"):
        if metadata.get(key) is not None:
            metadata[key] = WeightOrigin(**metadata[key])
    return CheckpointMetadata(**metadata)


def _restore_arrays(checkpoints: ocp.CheckpointManager, step: int, **abstract: Any) -> Any:
    """Restore items of a checkpoint, by name, on the mesh in force.

    Raises:
        ValueError: If the bit sums of an item differ from those that were saved.
    """
    items = {item: ocp.args.StandardRestore(on_current_mesh(tree)) for item, tree in abstract.items()}
    restored = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore(), **items))
    for item in items:
        if bit_sums(restored[item]) != restored.about["sums"][item]:
            raise _checksum_error(checkpoints, step, item)
    return restored


def _checksum_error(checkpoints: ocp.CheckpointManager, step: int, item: str) -> ValueError:
    """Return the error for arrays whose bit sums differ from those that were saved."""
    return ValueError(f"{checkpoints.directory}/{step}/{item} is damaged: the bit sums of its arrays differ from those saved")


PartConverters = Mapping[str, Callable[[jax.Array], Parameters]]
"""Path of an array -> a function that converts a part of the array (along its first dim) to that part of what is kept of it,
such as its quantized values and scales.
"""


def load_params(
    run_dir: str | Path, abstract: Abstract, step: int | None = None, keep: PartConverters | None = None
) -> tuple[Parameters, CheckpointMetadata]:
    """Load the trainable weights of a run onto the mesh in force.

    The newest checkpoint that can be read is used. Passing over a damaged one is logged, and nothing is renamed.

    Args:
        run_dir: The run.
        abstract: Shapes, dtypes and shardings of all arrays of the checkpoint.
        step: The step of the checkpoint to read; None for the newest.
        keep: The only arrays to read, and what to keep of each, so that an array never has to be in memory as a whole; None to
            read all of them. Arrays are read one after the other.

    Returns:
        The weights, and the metadata of the checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint (of `step`).
        RuntimeError: If no checkpoint can be read.
    """
    with open_read_only(run_dir) as checkpoints:
        steps = sorted(checkpoints.all_steps(), reverse=True)
        if not steps:
            raise FileNotFoundError(f"{run_dir} has no checkpoint")
        if step is not None:
            if step not in steps:
                raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}")
            steps = [step]
        for candidate in steps:
            try:
                return _load_array_by_array(checkpoints, candidate, abstract, keep), _read_metadata(checkpoints, candidate)
            except Exception as error:
                fault = f"the checkpoint of step {candidate} in {run_dir} cannot be read: {_brief(error)}"
                log.warning("%s", fault)
    raise RuntimeError(fault)


def _load_array_by_array(
    checkpoints: ocp.CheckpointManager, step: int, abstract: Abstract, keep: PartConverters | None
) -> Parameters:
    """Read the arrays of `abstract` one after the other, in parts, and verify their bit sums.

    Returns:
        The arrays, or what `keep` keeps of them.
    """
    about = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    # The sums are stored in the order of the sorted paths, which is the order of the leaves of a dict in JAX.
    sums = dict(zip(sorted(abstract), about["sums"]["params"], strict=True))
    loaded: Parameters = {}
    paths = abstract if keep is None else keep
    for path in paths:
        collected: Parameters = {}
        total = 0
        length = abstract[path].shape[0]
        for start, part in read_in_parts(Path(checkpoints.directory) / str(step) / "params", path, on_current_mesh(abstract[path])):
            total += bit_sums(part)[0]
            converted = {path: part} if keep is None else keep[path](part)
            for name, x in converted.items():
                collected[name] = add_part(collected.get(name), x, start, length)
            del part, converted
            jax.block_until_ready(collected)  # the next part may need the memory of this one
        if total % 2**32 != sums[path]:
            raise _checksum_error(checkpoints, step, "params")
        loaded |= collected
    return loaded


class Restored(NamedTuple):
    """A restored state without its frozen weights."""

    state: TrainState
    """The state; `frozen` is empty."""
    about: CheckpointMetadata
    """The metadata of the checkpoint."""
    damaged: dict[int, str]
    """Step -> error for the newer checkpoints that could not be read."""


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
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        # Any error counts as damage: what Orbax raises for a damaged file depends on which byte is wrong.
        try:
            about = _read_metadata(checkpoints, step)
            arrays = _restore_arrays(checkpoints, step, params=params_of(abstract), optimizer=optimizer_of(abstract))
        except Exception as error:
            damaged[step] = _brief(error)
            continue
        _rename_damaged(checkpoints, damaged)
        trainable, buffers = split_buffers(arrays.params)
        return Restored(TrainState(trainable=trainable, buffers=buffers, frozen={}, **arrays.optimizer), about, damaged)
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise RuntimeError(f"no checkpoint in {checkpoints.directory} can be read; the newest, of step {step}: {reason}")
    return None


def _rename_damaged(checkpoints: ocp.CheckpointManager, damaged: Mapping[int, str]) -> None:
    """Rename damaged checkpoints; one process does it, and all processes reload the list of steps."""
    if damaged and jax.process_index() == 0:
        for step in damaged:
            renamed = checkpoints.directory / f"damaged-{step}"
            shutil.rmtree(renamed, ignore_errors=True)  # left by an earlier restore of the same step
            (checkpoints.directory / str(step)).rename(renamed)
    if damaged:
        checkpoints.reload()


def open_read_only(run_dir: str | Path) -> ocp.CheckpointManager:
    """Open the checkpoints of a run read-only; use the result as a context manager."""
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False, enable_async_checkpointing=False)
    return ocp.CheckpointManager((Path(run_dir) / CHECKPOINTS_FOLDER).absolute(), options=options)
