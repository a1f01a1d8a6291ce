"""`run.json`: the log of a run, one entry for each start, resume and stop."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER
from moe_train.config import yaml_file
from moe_train.machine.files import read_object, write_text
from moe_train.machine.revision import code_revision
from moe_train.run.inputs import RunInputs
from moe_train.run.self_test import chosen_kernels
from moe_train.run.start import Start
from moe_train.run.writer import parse_line

log = logging.getLogger(__name__)

PACKAGES = ("moe-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages whose versions are recorded."""


@contextlib.contextmanager
def run_log(run: config.Run, run_dir: Path, begin: Start, inputs: RunInputs) -> Iterator[SimpleNamespace]:
    """Write to `run.json` how the run starts and, when the block ends, how it stops.

    Yields:
        A namespace that the caller keeps up to date: `step`, the last step done, and `reason`, why the run stops.
    """
    start = int(begin.state.step)
    entry = {
        **describe_process(),
        "config_sha256": config_sha256(run),
        "data_sha256": inputs.train.manifest_hash,
        "epochs": inputs.train.epochs(inputs.total_steps),
        "changed": begin.changed,
        "damaged": begin.damaged,
        "base": begin.base and begin.base.to_json(),
        "adapter": begin.adapter and begin.adapter.to_json(),
        "kernels": chosen_kernels(run),
    }
    write_event(run_dir, "resume" if begin.resumed else "start", start, **entry)
    stopped = SimpleNamespace(step=start, reason="finished")
    try:
        yield stopped
    except GeneratorExit:  # the caller of `loop.steps` has left its loop
        write_event(run_dir, "stop", stopped.step, reason="the caller stopped iterating")
        raise
    # Also KeyboardInterrupt and SystemExit: whatever ends a run is in its log.
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full, and the error that stopped the run is the one to show
            write_event(run_dir, "stop", stopped.step, reason=f"{type(error).__name__}: {error}")
        raise
    write_event(run_dir, "stop", stopped.step, reason=stopped.reason)


def config_sha256(run: config.Run) -> str:
    """Return the sha256 of the config that a run keeps in its folder."""
    return hashlib.sha256(yaml_file.dump(run.to_config()).encode()).hexdigest()


def write_event(run_dir: Path, event: str, step: int, **more: Any) -> None:
    """Append an event to `run.json`, replacing the file atomically; only the first process writes."""
    # All processes share the folder, and several writers would replace each other's entries.
    if jax.process_index():
        return
    path = run_dir / "run.json"
    events = _kept_events(path)
    timestamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    events.append({"event": event, "time": timestamp, "step": step, **more})
    write_text(path, json.dumps({"events": events}, indent=1, ensure_ascii=False) + "\n")


def _kept_events(path: Path) -> list[dict[str, Any]]:
    """Return the events so far; a damaged log is renamed, with a warning, and a new one begins."""
    try:
        return read_events(path)
    except ValueError as error:
        renamed = path.with_name(f"damaged-{path.name}")
        os.replace(path, renamed)
        log.warning("%s; it was renamed to %s, and a new log begins", error, renamed.name)
        return []


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a `run.json`; none if there is no such file.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if not path.exists():
        return []
    events: Any = read_object(path).get("events")
    is_log = isinstance(events, list) and all(isinstance(event, dict) and {"event", "step"} <= event.keys() for event in events)
    if not is_log:
        raise ValueError(f"{path} is damaged: it is not the log of a run")
    return events


def check_checkpoints_kept(run_dir: Path, save_steps: int) -> None:
    """Refuse to start from step 0 in a folder whose files show that its run has saved checkpoints.

    Args:
        run_dir: the folder, in which no checkpoint was found.
        save_steps: number of steps between two checkpoints.

    Raises:
        ValueError: the checkpoints are gone. Nothing has been changed.
    """
    saved_steps: dict[str, int] = {}
    path = run_dir / "run.json"
    with contextlib.suppress(ValueError):  # `write_event` names a damaged log
        for event in read_events(path):
            # A run that was asked to stop, or finished, has saved; one that failed may not have.
            is_saved = event["event"] == "resume" or event.get("reason") in ("finished", "SIGTERM", "SIGINT")
            if is_saved and event["step"]:
                saved_steps["run.json"] = event["step"]
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # the writer names a damaged line
            step = parse_line(line)["step"]
            # The second save waits for the first one, so that one is complete.
            if step > 2 * save_steps:
                saved_steps["metrics.jsonl"] = step
    for name, step in saved_steps.items():
        raise ValueError(
            f"{run_dir} has no checkpoint, but its {name} shows that checkpoints were saved (step {step}); restore "
            f"{run_dir / CHECKPOINTS_FOLDER} (is its disk mounted?), choose another run_dir, or remove metrics.jsonl and run.json "
            "to start from step 0"
        )


def describe_process() -> dict[str, Any]:
    """Return the command line, code revision, package versions and hardware of this process, ready for JSON."""
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "code": code_revision()._asdict(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "host": platform.node(),
            "host_cpus": os.cpu_count(),
        },
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
