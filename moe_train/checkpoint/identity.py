"""The identity of weights: hashes over every byte, and a check that they are unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from moe_train.checkpoint.initial_files import first_files
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, WeightOrigin, survey
from moe_train.checkpoint.runs import is_run, named_step, run_folder
from moe_train.weights import external, external_adapter, together


def base_origin(directory: str | Path) -> WeightOrigin:
    """Return the identity of the weights that `load_parameters` would read, with hashes over every byte.

    Args:
        directory: A run, whose named or else newest checkpoint counts, or an external model.

    Raises:
        FileNotFoundError: If a run has no checkpoint.
    """
    if not is_run(directory):
        hashes = external.hash_external_model(directory)
        return WeightOrigin(str(directory), None, hashes, external.hash_carried(directory))
    step = named_step(directory)
    directory = run_folder(directory)
    readable = survey(directory).readable
    if step is None:
        # The survey lists the newest first.
        step = next(iter(readable), None)
    if step is None:
        raise FileNotFoundError(f"{directory} has no checkpoint; train it first, or name a model")
    # A run has no tower of its own: it carries that of the files which it started from.
    base_of_run = readable[step].about.base if step in readable else None
    carried = {} if base_of_run is None else base_of_run.carried
    return WeightOrigin(str(directory), step, _file_hashes(Path(directory) / CHECKPOINTS_FOLDER / str(step) / "params"), carried)


class WeightsIdentity(NamedTuple):
    """Which weights were used."""

    source: str
    """Path of the run or model."""
    step: int | None
    """Step of a run's checkpoint; None for an external model."""
    sha256: str
    """A hash over every byte of the weights, those that an adapter belongs to included."""


def weights_identity(directory: str | Path) -> WeightsIdentity:
    """Return which weights a run or a model has, by a hash over all of them.

    A run's hash is over the files of its checkpoint, and over the recorded hashes of its base where weights are frozen.

    Raises:
        FileNotFoundError: If a run has no checkpoint.
    """
    origin = base_origin(directory)
    hashes = dict(origin.hashes)
    if origin.step is not None:
        saved = survey(run_folder(directory)).readable.get(origin.step)
        base = None if saved is None else saved.about.base
        if saved is not None and base is not None and saved.about.config.get("lora") is not None:
            hashes |= {f"base/{name}": digest for name, digest in base.hashes.items()}
    text = json.dumps(hashes, sort_keys=True)
    return WeightsIdentity(origin.source, origin.step, hashlib.sha256(text.encode()).hexdigest())


def adapter_origin(source: str | Path) -> WeightOrigin:
    """Return the identity of an adapter's files, as `base_origin` does for a model."""
    if is_run(source):
        return base_origin(source)
    return WeightOrigin(str(source), None, external_adapter.hash_external_adapter(source))


def check_base(base: WeightOrigin) -> None:
    """Raise an error if the weights that `base` names have changed.

    Raises:
        ValueError: If any tensor or file differs from when `base` was recorded.
        FileNotFoundError: If the checkpoint that holds the weights is gone.
    """
    if base.step is None:
        current_hashes = external.hash_external_model(base.source)
    else:
        folder = Path(base.source) / CHECKPOINTS_FOLDER / str(base.step) / "params"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing, which has the weights that this run's adapters belong to; restore it, or start a new run_dir"
            )
        current_hashes = _file_hashes(folder)
    # The union of names, so that a tensor that was added or removed counts as a change.
    changed = sorted(name for name in {*current_hashes, *base.hashes} if current_hashes.get(name) != base.hashes.get(name))
    if changed:
        raise ValueError(
            f"the base weights in {base.source} have changed since this run started ({len(changed)} tensors or files, the first "
            f"{changed[0]}); restore the original files, or start a new run_dir"
        )


def check_tower(base: WeightOrigin) -> None:
    """Raise ValueError if a tower and projector have changed since `base` was recorded."""
    files = first_files(base.source)
    current = {} if files is None else external.hash_carried(files)
    changed = sorted(name for name in {*current, *base.carried} if current.get(name) != base.carried.get(name))
    if changed:
        raise ValueError(
            f"the tower and projector in {files} have changed since this run started ({len(changed)} tensors, the first "
            f"{changed[0]}); restore the original files, or start a new run_dir"
        )


def _file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file by its name in the folder; with several processes, each reads a share of the files."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def hash_files(names: list[str]) -> dict[str, str]:
        """Return the sha256 of the named files."""
        hashes: dict[str, str] = {}
        for name in names:
            with files[name].open("rb") as content:
                hashes[name] = hashlib.file_digest(content, "sha256").hexdigest()
        return hashes

    return together.hash_in_shares({name: file.stat().st_size for name, file in files.items()}, hash_files)
