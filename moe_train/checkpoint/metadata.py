"""The metadata of checkpoints, and which checkpoints of a run have metadata that can be read.

The metadata are one small JSON file for each checkpoint, `about/metadata`, with a hash over its content. Nothing else is needed to
choose a checkpoint, and the only other files that are read are those of the arrays, which have bit sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_train.machine.agreement import exchange
from moe_train.machine.files import JsonObject, read_object

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
    carried: Mapping[str, str] = MappingProxyType({})
    """The sha256 of each tensor of a multimodal base's tower and projector, which exports carry; empty for a text model."""

    def to_json(self) -> JsonObject:
        """Return the fields by name. As a named tuple, JSON would store them as a list without names."""
        return {**self._asdict(), "carried": dict(self.carried)}


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
    tokenizer: str | None = None
    """Identity of the tokenizer: a sha256 over its files."""
    guard: JsonObject | None = None
    """State of the spike guard (`train.spike_guard.guard_to_json`); None without one."""
    suite_scores: dict[str, float] | None = None
    """Mean score on each suite of `evaluation.suites` at this step; None if they were not measured."""


class SavedCheckpoint(NamedTuple):
    """What the small file of a checkpoint states."""

    about: CheckpointMetadata
    sums: dict[str, list[int]]
    """The bit sums of the arrays of each item, in the order of the leaves."""
    held_out_loss: float | None
    """The held-out loss at this step; None if it was not measured."""

    @property
    def rank(self) -> float | None:
        """The smaller, the better (see `rank_of`); None if what counts was not measured."""
        return rank_of(self.about, self.held_out_loss)


def rank_of(about: CheckpointMetadata, held_out_loss: float | None) -> float | None:
    """Return what `checkpoint.best_by` judges a checkpoint by: the held-out loss, or minus the score of a suite.

    Returns:
        None if it was not measured.
    """
    best_by = about.config.get("checkpoint", {}).get("best_by", "loss")  # earlier versions had no such setting
    if best_by == "loss":
        return held_out_loss
    score = (about.suite_scores or {}).get(best_by)
    return None if score is None else -score


class Survey(NamedTuple):
    """The checkpoints of a run, on which all processes of the job agree."""

    readable: dict[int, SavedCheckpoint]
    """Step -> what the checkpoint states, the newest first."""
    damaged: dict[int, str]
    """Step -> the error, for checkpoints whose metadata cannot be read."""

    def best(self) -> int | None:
        """Return the best step by the run's `checkpoint.best_by`; None if no checkpoint was measured."""
        ranks = {step: saved.rank for step, saved in self.readable.items() if saved.rank is not None}
        return min(ranks, key=ranks.__getitem__, default=None)


def about_json(about: CheckpointMetadata, sums: dict[str, list[int]], held_out_loss: float | None) -> JsonObject:
    """Return the content of the metadata file, with a hash over all of it."""
    metadata = about._asdict()
    for key in ("base", "adapter"):
        if metadata[key] is not None:
            metadata[key] = metadata[key].to_json()
    content = {"about": metadata, "sums": sums, "held_out_loss": held_out_loss}
    return {**content, "sha256": _digest(content)}


def _digest(content: JsonObject) -> str:
    """Return the sha256 of JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def survey(run_dir: str | Path) -> Survey:
    """Read the metadata of all checkpoints of a run; every process of the job must call this.

    A checkpoint counts as damaged if any process cannot read its metadata, or reads something else than the first.
    """
    folder = Path(run_dir) / CHECKPOINTS_FOLDER
    saved: dict[int, SavedCheckpoint] = {}
    # Step -> (error, hash of the file). Steps are texts, since JSON has no other keys.
    seen: dict[str, tuple[str, str]] = {}
    for step in steps_on_disk(folder):
        file = folder / str(step) / "about" / "metadata"
        try:
            saved[step] = read_saved(folder / str(step))
            seen[str(step)] = ("", hashlib.sha256(file.read_bytes()).hexdigest())
        except (OSError, ValueError) as error:
            seen[str(step)] = (" ".join(str(error).split()), "")
    answers: list[dict[str, list[str]]] = [json.loads(text) for text in exchange(json.dumps(seen), "on the checkpoints of the run")]
    damaged: dict[int, str] = {}
    # Of all processes: a checkpoint that only some of them see counts as damaged.
    every_step = {int(step) for answer in answers for step in answer}
    for step in sorted(every_step, reverse=True):
        states = [answer.get(str(step), [f"{folder / str(step)} is missing", ""]) for answer in answers]
        faults = [f"{fault} (process {index})" for index, (fault, _) in enumerate(states) if fault]
        if len(answers) == 1:
            faults = [fault for fault, _ in states if fault]
        if not faults and len({digest for _, digest in states}) > 1:
            faults = [f"{folder / str(step)}/about/metadata differs between processes; let all of them see the same files"]
        if faults:
            damaged[step] = faults[0]
            saved.pop(step, None)
    # Callers rely on the order: the first entry is the newest checkpoint.
    return Survey({step: saved[step] for step in sorted(saved, reverse=True)}, damaged)


def newest_metadata(run_dir: str | Path) -> CheckpointMetadata | None:
    """Return the metadata of the newest checkpoint whose metadata can be read; None if there is none.

    Every process of the job must call this.
    """
    for saved in survey(run_dir).readable.values():
        return saved.about
    return None


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in ascending order; a save that was not finished has another name."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def read_saved(checkpoint: Path) -> SavedCheckpoint:
    """Read the metadata of one checkpoint.

    Raises:
        FileNotFoundError, ValueError: If the file is missing or damaged; the message names it.
    """
    file = checkpoint / "about" / "metadata"
    tree = read_object(file)
    # Taken out first, since the hash covers all the rest.
    digest = tree.pop("sha256", None)
    is_earlier_version = digest is None and tree.keys() == {"about", "sums"}  # without a hash
    if not is_earlier_version and digest != _digest(tree):
        raise ValueError(f"{file} is damaged: its content does not have the hash that it states")
    try:
        about = dict(tree["about"])
        for key in ("base", "adapter"):
            if about.get(key) is not None:
                about[key] = WeightOrigin(**about[key])
        sums = {item: [int(x) for x in tree["sums"][item]] for item in ("params", "optimizer")}
        metadata = CheckpointMetadata(**about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged: it does not state what a checkpoint states ({type(error).__name__}: {error})"
        ) from error
    if is_earlier_version:
        return SavedCheckpoint(metadata, sums, _loss_of_earlier_version(checkpoint / "metrics" / "metrics"))
    return SavedCheckpoint(metadata, sums, tree["held_out_loss"])


def _loss_of_earlier_version(file: Path) -> float | None:
    """Return the held-out loss that an earlier version kept in a file of its own; None, with a warning, if it is damaged."""
    if not file.exists():
        return None
    try:
        loss: Any = read_object(file).get("held_out_loss")
    except ValueError as error:
        loss = error
    if loss is None:
        return None
    if not isinstance(loss, float) or not math.isfinite(loss):
        log.warning("%s is damaged, so the held-out loss of this checkpoint counts as not measured", file)
        return None
    return loss
