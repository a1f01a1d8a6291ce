"""A run's own state on disk, through Orbax: what is saved, when it stays, and how it comes back.

    RUN_DIR/checkpoints/STEP/params       the trainable weights
                             optimizer    the optimizer's state, steps tried and skipped
                             about        JSON: `About`, and the sums of the arrays' bits
                             metrics      JSON: the held-out loss, where it was measured at this step

Of frozen weights a checkpoint holds the source and hashes alone. A checkpoint appears whole or not at all (Orbax
renames it into place), is written while training goes on, and fits any mesh.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moe_train import config
from moe_train.mesh import AXES
from moe_train.model.transformer import Parameters
from moe_train.train.state import TrainState, partition
from moe_train.weights import hf
from moe_train.weights.hf_config import read_model_config

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


def params_of(state: TrainState) -> Any:
    return state.trainable


def optimizer_of(state: TrainState) -> Any:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}


# --- saving --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(run_dir: str | Path, settings: config.Checkpoint) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, for writing; a save under way is finished, or has raised, when the block ends.

    Nothing is written, the folder included, before the first save.
    """
    checkpoints = _manager(run_dir, settings)
    try:
        yield checkpoints
    except BaseException:
        with contextlib.suppress(Exception):  # the error that ends the block is the one to show
            checkpoints.close()
        raise
    finish_saving(checkpoints)
    checkpoints.close()


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
    said = {**about._asdict(), "base": about.base and about.base._asdict()}
    arrays = {"params": params_of(state), "optimizer": optimizer_of(state)}
    sums = {item: bit_sums(tree) for item, tree in arrays.items()}
    args = ocp.args.Composite(
        about=ocp.args.JsonSave({"about": said, "sums": sums}),
        **{item: ocp.args.StandardSave(tree) for item, tree in arrays.items()},
    )
    metrics = {"held_out_loss": held_out_loss if held_out_loss is not None and math.isfinite(held_out_loss) else None}
    try:
        checkpoints.save(step, args=args, metrics=metrics, force=True)
    except Exception as error:
        raise _cannot_save(checkpoints, error) from error


def bit_sums(tree: Any) -> list[int]:
    """Of each array the sum of its elements' bits modulo 2^32, on any mesh the same: Orbax takes a flipped bit, or a
    missing part (as zeros), for a value."""
    return [int(x) for x in jax.device_get(_bit_sums(tree))]


@jax.jit
def _bit_sums(tree: Any) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(tree)]


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
        for unfinished in checkpoints.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full
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
    return About(**{**said, "base": said["base"] and Base(**said["base"])})


def _arrays(checkpoints: ocp.CheckpointManager, step: int, **abstract: Any) -> Any:
    """Items of a checkpoint, by name, on the mesh in force. Raises ValueError where they are not what was saved."""
    items = {item: ocp.args.StandardRestore(on_mesh(tree)) for item, tree in abstract.items()}
    found = checkpoints.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore(), **items))
    for item in items:
        if bit_sums(found[item]) != found.about["sums"][item]:
            raise ValueError(f"{checkpoints.directory}/{step}/{item} does not hold what was saved: its arrays have other sums")
    return found


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
        return Restored(TrainState(trainable=found.params, frozen={}, **found.optimizer), about, damaged)
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


# --- a model from a directory, a run's or Hugging Face's -------------------------------------------------------------


def is_run(directory: str | Path) -> bool:
    """Whether the directory is one of our runs."""
    return (Path(directory) / FOLDER).is_dir()


def run_config(run_dir: str | Path) -> config.Config:
    """The resolved config of a run's newest checkpoint; `model` is always stated.

    Raises FileNotFoundError where the run has no checkpoint.
    """
    with _reading(run_dir) as checkpoints:
        about = newest(checkpoints)
    if about is None:
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet that can be read")
    return config.Config.model_validate_json(json.dumps(about.config))


def read_model(directory: str | Path) -> config.Model:
    """The architecture of a run or of a Hugging Face model."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: no such folder; it has to be a run, or a Hugging Face model")
    if not is_run(directory):
        return read_model_config(directory)
    model = run_config(directory).model
    assert model is not None
    return model


def find_tokenizer(directory: str | Path) -> config.Tokenizer:
    """The tokenizer that a run was trained with, or that lies in a model's folder.

    Raises FileNotFoundError where there is none.
    """
    if is_run(directory):
        data = run_config(directory).data
        if data is not None and data.tokenizer is not None:
            return data.tokenizer
    folder = Path(directory)
    if (folder / "tokenizer.json").is_file():
        return config.HuggingFaceTokenizer(name="huggingface", path=str(folder))
    for file in sorted((*folder.glob("tekken.json"), *folder.glob("tokenizer.model*"))):
        return config.MistralTokenizer(name="mistral", path=str(file))
    raise FileNotFoundError(f"{directory} has no tokenizer.json, tekken.json or tokenizer.model; name one in data.tokenizer")


def resolve(run: config.Config) -> config.Config:
    """The config with everything stated that it leaves to `init_from`: the architecture and the tokenizer.

    Raises ValueError where config and checkpoint contradict each other, or the architecture does not go with the rest.
    """
    if run.init_from is None:
        return run
    model = read_model(run.init_from)
    if run.model is not None and run.model != model:
        theirs, ours = flat(model.model_dump(mode="json")), flat(run.model.model_dump(mode="json"))
        key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        raise ValueError(
            f"model.{key} is {ours.get(key)}, but {theirs.get(key)} in {run.init_from}; leave model out where init_from is given"
        )
    config.check_model(run, model)
    if is_run(run.init_from) and run_config(run.init_from).lora is not None:
        raise ValueError(f"init_from {run.init_from} is a run with adapters; export it with --merge, and start from the export")
    changes: dict[str, Any] = {"model": model}
    if run.data is not None and run.data.tokenizer is None:
        changes["data"] = run.data.model_copy(update={"tokenizer": find_tokenizer(run.init_from)})
    return run.model_copy(update=changes)


def with_mesh(run: config.Config, mesh: Mesh) -> config.Config:
    """The config with the sizes of the mesh that is here, checked: an axis of -1 could not be before."""
    assert run.model is not None
    here = run.model_copy(update={"mesh": config.Mesh.model_validate({axis: mesh.shape[axis] for axis in AXES})})
    config.check_model(here, run.model)
    config.check_batch(here)
    return here


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: x for key, below in tree.items() for path, x in flat(below, f"{prefix}.{key}" if prefix else key).items()}


def compute_here() -> config.Compute:
    """Number formats for a model that no run's config speaks for."""
    dtype: config.Dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.Compute(dtype=dtype, param_dtype=dtype)


def mesh_here(run: config.Config | None, model: config.Model) -> config.Mesh:
    """The run's mesh where its devices are here; otherwise all devices along `fsdp`."""
    devices = jax.device_count()
    if run is not None and math.prod(run.mesh.model_dump().values()) == devices:
        return run.mesh
    if model.model_dim % devices:
        raise ValueError(
            f"model_dim {model.model_dim} does not divide over the {devices} devices here; show the process fewer of them"
        )
    return config.Mesh(fsdp=devices)


def load_parameters(directory: str | Path, abstract: Mapping[str, Any], step: int | None = None) -> Parameters:
    """All weights of a run or of a Hugging Face model, as arrays of the shapes, dtypes and shardings of `abstract`.

    Of a run: what was trained from its newest checkpoint (or that of `step`), what was frozen from where it was
    loaded at first. Raises ValueError where that has changed since.
    """
    if not is_run(directory):
        return hf.load_parameters(directory, abstract)
    trainable, frozen = partition(dict(abstract))
    with _reading(directory) as checkpoints:
        step = _step(checkpoints, directory, step)
        try:
            about = _about(checkpoints, step)
            params: Parameters = dict(_arrays(checkpoints, step, params=trainable).params)
        except Exception as error:
            raise RuntimeError(f"the checkpoint of step {step} in {directory} cannot be read: {_brief(error)}") from error
    if frozen:
        assert about.base is not None
        check_base(about.base)
        params |= load_parameters(about.base.source, frozen, about.base.step)
    return params


def base_of(directory: str | Path) -> Base:
    """The identity of the weights that `load_parameters` would read: their hashes, of every byte."""
    if not is_run(directory):
        return Base(str(directory), None, hf.hashes(directory))
    with _reading(directory) as checkpoints:
        step = _step(checkpoints, directory, None)
    return Base(str(directory), step, _file_hashes(Path(directory) / FOLDER / str(step) / "params"))


def check_base(base: Base) -> None:
    """Raise ValueError where the weights that `base` names are not the same any more."""
    if base.step is None:
        now = hf.hashes(base.source)
    else:
        folder = Path(base.source) / FOLDER / str(base.step) / "params"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is gone, and holds the weights that this run's adapters belong to")
        now = _file_hashes(folder)
    changed = sorted(name for name in {*now, *base.hashes} if now.get(name) != base.hashes.get(name))
    if changed:
        raise ValueError(
            f"the base weights in {base.source} have changed since this run started ({len(changed)} tensors or files, the first "
            f"{changed[0]}); bring the old ones back, or start a new run_dir"
        )


def _file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {}
    for file in files:
        with file.open("rb") as content:
            hashes[str(file.relative_to(folder))] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def _step(checkpoints: ocp.CheckpointManager, directory: str | Path, step: int | None) -> int:
    steps = checkpoints.all_steps()
    if not steps or (step is not None and step not in steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{directory} has {which}")
    return max(steps) if step is None else step


def _reading(run_dir: str | Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False, enable_async_checkpointing=False)
    return ocp.CheckpointManager((Path(run_dir) / FOLDER).absolute(), options=options)
