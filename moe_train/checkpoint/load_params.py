"""Load the trainable weights of a run onto a mesh, array by array, with a bound on the memory of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_train.checkpoint.arrays import add_part, read_in_parts
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, CheckpointMetadata, SavedCheckpoint, survey
from moe_train.checkpoint.reading import ReadOutcome, fault_of_any, on_current_mesh, short_reason
from moe_train.model.parameters import Parameters
from moe_train.weights.arrays import Abstract

log = logging.getLogger(__name__)

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
    run_dir: str | Path,
    abstract: Abstract,
    step: int | None = None,
    keep: PartConverters | None = None,
    *,
    announce: bool = True,
) -> LoadedParams:
    """Load the trainable weights of a run onto the mesh in force; every process of the job must call this.

    The newest checkpoint that can be read is used. Passing over a damaged one is logged, and nothing is renamed.

    Args:
        run_dir: The run.
        abstract: Shapes, dtypes and shardings of all arrays of the checkpoint.
        step: The step of the checkpoint to read; None for the newest.
        keep: The only arrays to read, and what to keep of each, so that an array never has to be in memory as a whole; None to
            read all of them. Arrays are read one after the other.
        announce: Whether to log which checkpoint was taken; not for one that nobody has asked for.

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
            if announce:
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
    measured = {other: saved.rank for other, saved in readable.items() if saved.rank is not None}
    best = min(measured, key=measured.__getitem__, default=step)
    quality = "" if loss is None else f"; held-out loss {loss:.4f}"
    for suite, score in (readable[step].about.suite_scores or {}).items():
        quality += f"; {suite} {score:.4f}"
    best_by = readable[step].about.config.get("checkpoint", {}).get("best_by", "loss")
    if best != step and best_by != "loss":
        quality += f"; the best {best_by} is that of step {best}, {-measured[best]:.4f} ({run_dir}@best)"
    elif best != step:
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
        fault = f"{params}: {short_reason(error)}"
    return loaded, fault_of_any(ReadOutcome(fault, totals), [sums[path] for path in paths], str(params))


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
