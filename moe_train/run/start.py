"""The state that a run starts from: its newest checkpoint, the weights of `init_from`, or random weights."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from moe_train import config
from moe_train.checkpoint import identity, model_dir
from moe_train.checkpoint.metadata import CheckpointMetadata, WeightOrigin, newest_metadata
from moe_train.checkpoint.restore import restore
from moe_train.checkpoint.runs import run_folder, saved_config
from moe_train.config import yaml_file
from moe_train.data.batches.loader import Loader
from moe_train.machine.compiler_options import brief_options
from moe_train.machine.host_memory import check_host_memory
from moe_train.machine.mesh import platform
from moe_train.model.parameters import Parameters, initial_parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.transformer import abstract_model, init_model
from moe_train.train.optimizer import make_optimizer, rate_arrays
from moe_train.train.spike_guard import guard_of_json
from moe_train.train.state import TrainState, partition, state_of_learned


class Start(NamedTuple):
    """The state that training continues from, and where it came from."""

    structure: Any
    """Structure of the model without its arrays, as `combine` takes it."""
    optimizer: optax.GradientTransformation
    state: TrainState
    resumed: bool
    """Whether the state comes from a checkpoint of this run."""
    base_weights: Parameters
    """Base weights of what is trained in full while other weights are frozen; routing is compared with the base model's through
    them. Empty otherwise.
    """
    base: WeightOrigin | None
    """Identity of the weights of `init_from`; None if the run started from random weights."""
    adapter: WeightOrigin | None
    """Identity of the adapter of `lora.init_from`; None without one."""
    changed: dict[str, tuple[Any, Any]]
    """Settings that differ from the checkpoint's, {key: (then, now)}."""
    damaged: dict[int, str]
    """Newer checkpoints that could not be read, {step: reason}."""
    sizes: tuple[int, int]
    """Numbers of parameters: (all, trained)."""
    checkpoint_step: int | None = None
    """Step of the checkpoint that the state comes from; None without one."""
    held_out_loss: float | None = None
    """Held-out loss that the checkpoint states; None if it was not measured there."""

    def after_roll_back(self, position: int, spikes: int) -> Start:
        """Return the same start at a later position in the data: the steps in between count as skipped.

        Args:
            position: the step after which training continues.
            spikes: number of spikes so far.
        """
        state = self.state
        assert state.guard is not None
        discarded = position - int(state.step)
        # Sums and not new arrays, so that each keeps its sharding.
        guard = state.guard._replace(
            spikes=state.guard.spikes + (spikes - int(state.guard.spikes)), discarded=state.guard.discarded + discarded
        )
        step = state.step + discarded
        return self._replace(state=state._replace(step=step, skipped=state.skipped + discarded, guard=guard))


def starting_state(run: config.Run, loader: Loader, checkpoints: ocp.CheckpointManager, total_steps: int) -> Start:
    """Build the state that a resolved run starts from, on the mesh in force.

    Nothing is written, except that a damaged checkpoint is renamed.

    Args:
        run: the resolved run.
        loader: training data, whose identity must match the checkpoint's.
        checkpoints: the checkpoints of this run, if it has any.
        total_steps: optimizer steps of the whole run, for the schedule.

    Raises:
        ValueError: the config, the data or the base differ from the checkpoint's.
    """
    # Shapes are computed first, so that at most one copy of the weights is ever allocated.
    structure, shapes = parameters(abstract_model(run.model, run.compute, run.lora, run.model_encoder))
    parts = _parts(run, shapes)
    optimizer = make_optimizer(run.optimizer, total_steps)
    new_state = jax.jit(partial(state_of_learned, optimizer=optimizer), compiler_options=brief_options(platform()) or None)
    learned_state = jax.eval_shape(new_state, parts.learned)
    check_host_memory((learned_state, parts.frozen, parts.tower), run.name)

    # Only the metadata: a config or data that differ are refused before any weights are read.
    last = newest_metadata(run.run_dir)
    changed = {} if last is None else _changes(run, last, loader)
    base = _base(run, last, bool(parts.frozen))
    adapter = _adapter(run, last)
    if last is not None and base is not None and (parts.tower or run.stored_features is not None):
        identity.check_tower(base)
    frozen, base_weights = _base_weights(run, parts, base)

    restored = restore(checkpoints, learned_state)
    state = new_state(_learned(run, parts, base, adapter, base_weights)) if restored is None else restored.state
    guard = None
    if run.train.spike_guard is not None:
        guard = guard_of_json(run.train.spike_guard, None if restored is None else restored.about.guard)
    return Start(
        structure,
        optimizer,
        state._replace(frozen=frozen, guard=guard, learning_rates=rate_arrays(run.optimizer)),
        restored is not None,
        base_weights,
        base,
        adapter,
        changed,
        {} if restored is None else restored.damaged,
        (sum(x.size for x in unquantized_shapes(shapes).values()), sum(x.size for x in parts.learned.values())),
        None if restored is None else int(state.step),
        None if restored is None else restored.held_out_loss,
    )


class _Parts(NamedTuple):
    """Shapes of a model's parameters, {path: shape}, by where they come from."""

    learned: dict[str, Any]
    """What is trained, and held in checkpoints."""
    frozen: dict[str, Any]
    """What stays as in the base model, without the tower."""
    tower: dict[str, Any]
    """A tower that is frozen, which has no part in what is compared with the base model."""
    in_base: dict[str, Any]
    """What the base model has: all but adapters and a frozen tower."""


def _parts(run: config.Run, shapes: dict[str, Any]) -> _Parts:
    """Divide the parameters of a run's model by where they come from."""
    learned, frozen = partition(shapes, run.lora, run.trained_tower)
    tower = {path: frozen.pop(path) for path in list(frozen) if ParameterPath.parse(path).is_tower}
    in_base = {path: x for path, x in shapes.items() if path not in tower and not ParameterPath.parse(path).is_adapter}
    return _Parts(learned, frozen, tower, in_base)


def _initial(run: config.Run, paths: Collection[str]) -> Parameters:
    """Return the random weights of a new run at some paths."""
    return initial_parameters(partial(init_model, run.seed, run.model, run.compute, run.lora, run.model_encoder), paths)


def _base_weights(run: config.Run, parts: _Parts, base: WeightOrigin | None) -> tuple[Parameters, Parameters]:
    """Load what checkpoints do not hold, at every start.

    Returns:
        The frozen weights, and the base model's weights of what is trained in full (`Start.base_weights`).
    """
    weights: Parameters = {}
    if base is not None and parts.frozen:
        weights = model_dir.load_parameters(base.source, _in_base(run, parts.in_base), base.step)
        # A new head for scores is not in the base; the base model is compared with as if it had the same.
        weights |= _initial(run, parts.in_base.keys() - weights)
    frozen = {path: weights[path] for path in parts.frozen}
    if parts.tower:
        assert base is not None  # `Config` requires init_from
        frozen |= model_dir.load_parameters(base.source, parts.tower, base.step)
    return frozen, {path: x for path, x in weights.items() if path in parts.learned}


def _learned(
    run: config.Run, parts: _Parts, base: WeightOrigin | None, adapter: WeightOrigin | None, base_weights: Parameters
) -> Parameters:
    """Return what a new run begins to train: weights of the base or of an adapter, and random ones for the rest."""
    if base is not None and not parts.frozen:
        loaded = model_dir.load_parameters(base.source, _in_base(run, parts.learned), base.step)
    else:
        # A copy, since the step donates the trained weights while the base weights must stay.
        loaded = jax.tree.map(jnp.copy, base_weights)
        if adapter is not None:
            loaded |= model_dir.load_adapter(adapter, run.model, parts.learned, run.encoder)
    return _initial(run, parts.learned.keys() - loaded) | loaded


def _in_base(run: config.Run, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of those arrays that the weights of `init_from` have: a new head for scores is not among them."""
    assert run.init_from is not None
    if run.model.scores is None or model_dir.read_model(run.init_from).scores is not None:
        return shapes
    return {path: like for path, like in shapes.items() if not ParameterPath.parse(path).is_head}


_DECIDED_AT_START = (
    *("seed", "model", "lora", "vision", "audio", "objective", "train.batch_size", "train.seq_len", "compute.param_dtype"),
    *("optimizer.name", "optimizer.min_dim_size_to_factor", "optimizer.rounding"),
)
"""Settings that a run cannot change: its checkpoint would no longer fit, or its batches would differ."""


def _changes(run: config.Run, last: CheckpointMetadata, loader: Loader) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the checkpoint's, {key: (then, now)}.

    Raises:
        ValueError: a setting that is fixed when a run starts, the base or the training data differ.
    """
    before = saved_config(run.run_dir, last)
    saved = yaml_file.flat(before.model_dump(mode="json"))
    current = yaml_file.flat(run.to_config().model_dump(mode="json"))
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**saved, **current}:
        if saved.get(key) != current.get(key):
            changed[key] = (saved.get(key), current.get(key))
    for key, (old, new) in changed.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _DECIDED_AT_START):
            raise ValueError(
                f"{key} is {new}, but the run in {run.run_dir} was started with {old}; restore it, or choose another run_dir"
            )
    # Only whether there is a base is fixed: its path may change, and frozen weights are compared by their hashes.
    if (last.base is None) != (run.init_from is None):
        original_path = last.config["init_from"]
        raise ValueError(
            f"init_from is {run.init_from}, but the run in {run.run_dir} was started with {original_path}; "
            "restore it, or choose another run_dir"
        )
    if last.data != loader.identity:
        raise ValueError(
            f"the training data have changed since the run in {run.run_dir} was started, so its position in them "
            f"(row {last.row}) is no longer valid; restore files, tokenizer and source weights, or choose another run_dir"
        )
    return changed


def _base(run: config.Run, last: CheckpointMetadata | None, frozen: bool) -> WeightOrigin | None:
    """Return the identity of the weights of `init_from`, or None for random weights.

    Args:
        run: the resolved run.
        last: what the newest checkpoint records; None for a new run.
        frozen: whether some weights are frozen, so that a resumed run loads them again; they are then checked against the
            checkpoint.
    """
    if run.init_from is None:
        if frozen:
            raise ValueError(
                "lora needs init_from, since adapters belong to weights that can be loaded again; state it, or leave lora out"
            )
        return None
    if last is None:
        return identity.base_origin(run.init_from)
    assert last.base is not None
    # The hashes of the start with the path of today, since a run or its base may have been moved.
    base = last.base._replace(source=str(run_folder(run.init_from)))
    if frozen:
        identity.check_base(base)
    return base


def _adapter(run: config.Run, last: CheckpointMetadata | None) -> WeightOrigin | None:
    """Return the identity of the adapter that the run starts from; a resumed run must find the same adapter."""
    if run.lora is None or run.lora.init_from is None:
        return None
    current_adapter = identity.adapter_origin(run.lora.init_from)
    if last is not None and last.adapter is not None and last.adapter.hashes != current_adapter.hashes:
        raise ValueError(
            f"the adapter in {run.lora.init_from} has changed since this run was started; restore it, or choose another run_dir"
        )
    return current_adapter
