"""A run's own state on disk, through Orbax: what is saved, when it stays, and how it comes back.

    RUN_DIR/checkpoints/STEP/params       the trainable weights, and the routers' biases
                             optimizer    the optimizer's state, steps tried and skipped
                             about        JSON: `About`, and the sums of the arrays' bits
                             metrics      JSON: the held-out loss, where it was measured at this step

Of frozen weights a checkpoint holds the source and hashes alone. A checkpoint appears whole or not at all (Orbax
renames it into place), is written while training goes on, and fits any mesh.
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
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moe_train import config
from moe_train.checkpoint.arrays import bit_sums, in_chunks, joined, parts
from moe_train.model.parameters import Parameters
from moe_train.train.state import TrainState, split_buffers

log = logging.getLogger(__name__)
FOLDER = "checkpoints"


class Base(NamedTuple):
    """Where a run's first weights are from: a Hugging Face directory, or a run and its checkpoint's step."""

    source: str
    step: int | None
    hashes: dict[str, str]
    """sha256 of each tensor, or of each file of the checkpoint's weights."""


class About(NamedTuple):
    """What a checkpoint says of itself, beside its arrays."""

    config: dict[str, Any]
    """Resolved: every default and the architecture stated."""
    row: int
    """Rows of the training data used: the position in the global order."""
    data: str
    """The loader's identity: a hash of what decides the batches."""
    base: Base | None
    manifest: str | None = None
    """The hash over the manifests of the training data."""
    adapter: Base | None = None
    """Where its first adapters are from, where they are not new."""


def params_of(state: TrainState) -> Any:
    return state.learned


def optimizer_of(state: TrainState) -> Any:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}


# --- saving --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(run_dir: str | Path, settings: config.Checkpoint) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, for writing; a save under way is finished, or has raised, when the block ends.

    Nothing is written, the folder included, before the first save.
    """
    checkpoints, orbax_log = _manager(run_dir, settings), logging.getLogger("absl")
    orbax_log.addFilter(_no_traceback)
    try:
        yield checkpoints
    except BaseException:
        with contextlib.suppress(Exception):  # the error that ends the block is the one to show
            checkpoints.close()
        raise
    else:
        finish_saving(checkpoints)
        checkpoints.close()
    finally:
        orbax_log.removeFilter(_no_traceback)


def _no_traceback(record: logging.LogRecord) -> bool:
    """False for an error of Orbax's threads: it is raised again where the save is waited for."""
    return not (record.exc_info and "orbax" in record.pathname)


def _manager(run_dir: str | Path, settings: config.Checkpoint) -> ocp.CheckpointManager:
    keep: list[Any] = [LatestN(settings.keep_last)]
    if settings.keep_best:
        best = BestN(get_metric_fn=_loss_or_inf, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=_loss_or_inf,  # Orbax writes metrics only where this is set
        best_mode="min",
        create=False,
        cleanup_tmp_directories=(Path(run_dir) / FOLDER).exists(),
        save_root_metadata=False,
    )
    return ocp.CheckpointManager((Path(run_dir) / FOLDER).absolute(), options=options)


def _loss_or_inf(metrics: Mapping[str, float | None]) -> float:
    loss = metrics["held_out_loss"]
    return math.inf if loss is None else loss


def best_loss(checkpoints: ocp.CheckpointManager) -> float:
    """The lowest held-out loss of the checkpoints that are there; infinite where none has one."""
    measured = (checkpoints.metrics(step) for step in checkpoints.all_steps())
    return min((_loss_or_inf(metrics) for metrics in measured if metrics), default=math.inf)


def save(
    checkpoints: ocp.CheckpointManager, step: int, state: TrainState, about: About, held_out_loss: float | None = None
) -> None:
    """Start saving; the state may be donated as soon as this returns. Does nothing where `step` is saved already.

    Raises RuntimeError where this save, or the one before, could not be written; the checkpoints before stay.
    """
    if step in checkpoints.all_steps():
        return
    Path(checkpoints.directory).mkdir(parents=True, exist_ok=True)
    origins = {"base": about.base, "adapter": about.adapter}
    said = {**about._asdict(), **{key: origin and origin._asdict() for key, origin in origins.items()}}
    arrays = {"params": params_of(state), "optimizer": optimizer_of(state)}
    sums = {item: bit_sums(tree) for item, tree in arrays.items()}
    args = ocp.args.Composite(
        about=ocp.args.JsonSave({"about": said, "sums": sums}),
        **{item: ocp.args.StandardSave(tree, in_chunks(tree)) for item, tree in arrays.items()},
    )
    metrics = {"held_out_loss": held_out_loss if held_out_loss is not None and math.isfinite(held_out_loss) else None}
    try:
        checkpoints.save(step, args=args, metrics=metrics, force=True)
    except Exception as error:
        raise _cannot_save(checkpoints, error) from error


def finish_saving(checkpoints: ocp.CheckpointManager) -> None:
    """Wait for the save under way. Raises as `save` does."""
    try:
        checkpoints.wait_until_finished()
    except Exception as error:
        raise _cannot_save(checkpoints, error) from error


def check_saving(checkpoints: ocp.CheckpointManager) -> None:
    """Raise as `save` does if the save under way has failed so far; does not wait."""
    try:
        checkpoints.check_for_errors()
    except Exception as error:
        raise _cannot_save(checkpoints, error) from error


def _cannot_save(checkpoints: ocp.CheckpointManager, error: Exception) -> RuntimeError:
    if jax.process_index() == 0:
        for _ in range(20):  # one of several writers has failed, and the others may not be done
            for unfinished in checkpoints.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full
            time.sleep(0.05)
            if not any(checkpoints.directory.glob("*.orbax-checkpoint-tmp*")):
                break
    checkpoints.reload()
    last = checkpoints.latest_step()
    kept = "there is none before it" if last is None else f"the one of step {last} is intact"
    return RuntimeError(f"could not save a checkpoint in {checkpoints.directory}: {_brief(error)}; {kept}")


def _brief(error: BaseException) -> str:
    """An error in one line of about 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


# --- restoring -----------------------------------------------------------------------------------------------------


def on_mesh(abstract: Any) -> Any:
    """Shapes as `jax.eval_shape` gives them -> the same with the mesh in force, devices and all, in their shardings."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec  # a scalar that an optimizer made has none
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


def newest(checkpoints: ocp.CheckpointManager) -> About | None:
    """What the newest checkpoint whose description can be read says of itself; None where there is none."""
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            return _about(checkpoints, step)
        except Exception:  # damaged: `restore` says so, once an older one has proved good
            continue
    return None


def _about(checkpoints: ocp.CheckpointManager, step: int) -> About:
    said = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about["about"]
    return About(**{**said, **{key: said.get(key) and Base(**said[key]) for key in ("base", "adapter")}})


def _arrays(checkpoints: ocp.CheckpointManager, step: int, **abstract: Any) -> Any:
    """Items of a checkpoint, by name, on the mesh in force. Raises ValueError where they are not what was saved."""
    items = {item: ocp.args.StandardRestore(on_mesh(tree)) for item, tree in abstract.items()}
    found = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore(), **items))
    for item in items:
        if bit_sums(found[item]) != found.about["sums"][item]:
            raise _other_sums(checkpoints, step, item)
    return found


def _other_sums(checkpoints: ocp.CheckpointManager, step: int, item: str) -> ValueError:
    return ValueError(f"{checkpoints.directory}/{step}/{item} does not hold what was saved: its arrays have other sums")


Keep = Mapping[str, Callable[[jax.Array], Parameters]]
"""By an array's path, what makes of a part of it (of its first dim) that part of what is kept."""


def load_params(
    run_dir: str | Path, abstract: Parameters, step: int | None = None, keep: Keep | None = None
) -> tuple[Parameters, About]:
    """The trainable weights of a run's newest checkpoint that can be read (or of the one of `step`), and what it says.

    On the mesh in force. keep: read these alone, and hold of each no more than this says. They are read one after the
    other. Passing a damaged checkpoint over is logged; nothing is renamed. Raises FileNotFoundError where there is none,
    RuntimeError where none can be read.
    """
    with reading(run_dir) as checkpoints:
        there = sorted(checkpoints.all_steps(), reverse=True)
        steps = there if step is None else [s for s in there if s == step]
        if not steps:
            raise FileNotFoundError(f"{run_dir} has no checkpoint" + (f" of step {step}" if step is not None else ""))
        for step in steps:
            try:
                return _one_by_one(checkpoints, step, abstract, keep), _about(checkpoints, step)
            except Exception as error:
                fault = f"the checkpoint of step {step} in {run_dir} cannot be read: {_brief(error)}"
                log.warning("%s", fault)
    raise RuntimeError(fault)


def _one_by_one(checkpoints: ocp.CheckpointManager, step: int, abstract: Parameters, keep: Keep | None) -> Parameters:
    """As `_arrays`, for all the weights of `abstract`, or what is to be kept of some."""
    about = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    sums = dict(zip(sorted(abstract), about["sums"]["params"], strict=True))
    kept: Parameters = {}
    for path in abstract if keep is None else keep:
        found: Parameters = {}
        total, length = 0, abstract[path].shape[0]
        for start, part in parts(Path(checkpoints.directory) / str(step) / "params", path, on_mesh(abstract[path])):
            total += bit_sums(part)[0]
            made = {path: part} if keep is None else keep[path](part)
            for name, x in made.items():
                found[name] = joined(found.get(name), x, start, length)
            del part, made
            jax.block_until_ready(found)  # the next part may need the room of this one
        if total % 2**32 != sums[path]:
            raise _other_sums(checkpoints, step, "params")
        kept |= found
    return kept


class Restored(NamedTuple):
    """A state without its frozen weights, and what had to be passed over to get it."""

    state: TrainState
    about: About
    damaged: dict[int, str]


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState) -> Restored | None:
    """The newest checkpoint that can be read in full, on the mesh in force; None where there is no checkpoint.

    A newer one that cannot be read is damaged: it is renamed to `damaged-STEP`, and returned under `damaged` for the
    caller to say so. Raises RuntimeError where none can be read, and renames nothing then.
    """
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            about = _about(checkpoints, step)
            found = _arrays(checkpoints, step, params=params_of(abstract), optimizer=optimizer_of(abstract))
        except Exception as error:
            damaged[step] = _brief(error)
            continue
        _set_aside(checkpoints, damaged)
        trainable, buffers = split_buffers(found.params)
        return Restored(TrainState(trainable=trainable, buffers=buffers, frozen={}, **found.optimizer), about, damaged)
    if damaged:
        step, why = next(iter(damaged.items()))
        raise RuntimeError(f"no checkpoint in {checkpoints.directory} can be read; the newest, of step {step}: {why}")
    return None


def _set_aside(checkpoints: ocp.CheckpointManager, damaged: Mapping[int, str]) -> None:
    if damaged and jax.process_index() == 0:
        for step in damaged:
            aside = checkpoints.directory / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # an older one of the same step
            (checkpoints.directory / str(step)).rename(aside)
    if damaged:
        checkpoints.reload()


def reading(run_dir: str | Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, for reading alone; a context manager."""
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False, enable_async_checkpointing=False)
    return ocp.CheckpointManager((Path(run_dir) / FOLDER).absolute(), options=options)
