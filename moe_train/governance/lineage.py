"""What a model was made from: its base, its data, its training and its figures, read from the records of a run."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from moe_train import config
from moe_train.checkpoint.metadata import CheckpointMetadata, WeightOrigin
from moe_train.data.prepared.manifest import MANIFEST, Manifest
from moe_train.machine.files import JsonObject, read_object

log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """A held-out loss that the run has measured."""

    step: int
    loss: float
    """Mean loss of the held-out data; the objective says of what."""


class Training(NamedTuple):
    """The training that made the weights of a checkpoint."""

    run: config.Run
    step: int
    base: WeightOrigin | None
    """Source of the initial weights; None if they were random."""
    data: tuple[Manifest, ...]
    """The prepared sets that were trained on; empty if the run keeps no manifest."""
    data_hash: str | None
    """The hash over these sets that the checkpoint states."""
    held_out: tuple[HeldOut, ...]
    """All measurements up to the checkpoint, in order."""
    sessions: tuple[JsonObject, ...]
    """What `run.json` states about each start and resume: command, versions, hardware."""
    seconds: float | None
    """Time between the starts and stops; None if a stop is not recorded, or if the run went on after the checkpoint."""
    suite_scores: Mapping[str, float] = MappingProxyType({})
    """Mean score on each suite at the checkpoint; empty if none was measured."""


class Lineage(NamedTuple):
    """A model in files, and what it was made from."""

    name: str
    layout: str
    """Format of the files: hf, mistral, gguf, peft, mistral-lora or gguf-lora."""
    model: config.Model
    lora: config.Lora | None
    """The adapters that the files hold, or that were merged into them; None without any."""
    num_parameters: int
    """Number of parameters in the files, without those of a carried tower."""
    source: str
    """The run or model that was exported."""
    training: Training | None
    """None if the source is no run."""
    carried_input: Literal["image", "audio"] | None = None
    """What the files take besides text, through the tower of a multimodal base; None for a text model."""

    @property
    def inputs(self) -> list[str]:
        """Kinds of content that the files take."""
        return ["text"] if self.carried_input is None else ["text", self.carried_input]

    @property
    def task(self) -> str:
        """Name of the task on the hub."""
        if self.model.scores is not None:
            return "text-classification"
        return {None: "text-generation", "image": "image-text-to-text", "audio": "audio-text-to-text"}[self.carried_input]

    @property
    def is_adapter(self) -> bool:
        """Return whether the files hold adapters alone."""
        return self.layout in ("peft", "mistral-lora", "gguf-lora")


def training_of(run_dir: Path, run: config.Run, about: CheckpointMetadata, step: int) -> Training:
    """Read how a checkpoint of a run came about.

    Args:
        run_dir: the folder of the run.
        run: the resolved run.
        about: metadata of the checkpoint.
        step: its step.

    A record that is damaged, as a kill leaves it, is left out with a warning that names its file: it stops no export.
    """
    events = _events(run_dir / "run.json")
    starts = [event for event in events if event["event"] in ("start", "resume") and event["step"] <= step]
    return Training(
        run=run,
        step=step,
        base=about.base,
        data=manifests_of(run_dir / MANIFEST),
        data_hash=about.manifest,
        held_out=tuple(_held_out(run_dir / "metrics.jsonl", step)),
        sessions=tuple(starts),
        seconds=_seconds(events, step),
        suite_scores=about.suite_scores or {},
    )


def hub_sets_of(run: config.Run) -> list[str]:
    """Return the data sets of the hub that a run trains on."""
    if not isinstance(run.data, config.RunData):
        return []
    return sorted({source.dataset for source in run.data.train if isinstance(source, config.HubSource)})


def _events(path: Path) -> list[JsonObject]:
    """Return the events of `run.json`; none if there is no such file, or if it is damaged."""
    if not path.exists():
        return []
    try:
        events = [event for event in read_object(path)["events"] if event["event"] in ("start", "resume", "stop")]
        for event in events:
            datetime.datetime.fromisoformat(event["time"])
            int(event["step"])
    except (ValueError, KeyError, TypeError) as error:
        _warn(path, error)
        return []
    return events


def manifests_of(path: Path) -> tuple[Manifest, ...]:
    """Return the manifests of the sets that a run trains on; none if there is no such file, or if it is damaged."""
    if not path.exists():
        return ()
    try:
        return tuple(Manifest.model_validate_json(json.dumps(entry)) for entry in read_object(path)["sets"])
    except (ValueError, KeyError, TypeError) as error:
        _warn(path, error)
        return ()


def _held_out(path: Path, step: int) -> Iterable[HeldOut]:
    """Yield the held-out losses in `metrics.jsonl` up to a step."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            is_measured = record["kind"] == "eval" and record["step"] <= step and isinstance(record["loss"], float)
        except (ValueError, KeyError, TypeError) as error:
            _warn(f"{path}:{number}", error)
            continue
        if is_measured:
            yield HeldOut(record["step"], record["loss"])


def _warn(location: Path | str, error: Exception) -> None:
    """Say that a record is damaged."""
    reason = " ".join(str(error).split())[:200]
    log.warning("%s is damaged (%s), so the model card and the bill of materials leave it out", location, reason)


def _seconds(events: Sequence[JsonObject], step: int) -> float | None:
    """Return the time that a run was at work up to a step; None if that is not recorded, as after a kill or for an earlier step."""
    if any(event["step"] > step for event in events):
        return None
    total = 0.0
    started: datetime.datetime | None = None
    for event in events:
        time = datetime.datetime.fromisoformat(event["time"])
        if event["event"] == "stop":
            if started is None:
                return None
            total += (time - started).total_seconds()
            started = None
        elif event["event"] in ("start", "resume"):
            if started is not None:
                return None
            started = time
    return total if started is None and total else None
