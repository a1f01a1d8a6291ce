"""`run.json`: the log of a run, one entry for each start, resume and stop."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from moe_train import config
from moe_train.config import yaml_file
from moe_train.machine.files import write_text
from moe_train.run.inputs import RunInputs
from moe_train.run.self_test import chosen_kernels
from moe_train.run.start import Start

PACKAGES = ("moe-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages whose versions are recorded."""


@contextlib.contextmanager
def run_log(run: config.Run, run_dir: Path, begin: Start, inputs: RunInputs) -> Iterator[SimpleNamespace]:
    """Write to `run.json` how the run starts and, when the block ends, how it stops.

    Yields:
        A namespace that the caller keeps up to date: `step`, the last step done, and `reason`, why the run stops.
    """
    start = int(begin.state.step)
    digest = hashlib.sha256(yaml_file.dump(run.to_config()).encode()).hexdigest()
    entry = {
        **describe_process(),
        "config_sha256": digest,
        "epochs": inputs.train.epochs(inputs.total_steps),
        "changed": begin.changed,
        "damaged": begin.damaged,
        "base": begin.base and begin.base._asdict(),
        "adapter": begin.adapter and begin.adapter._asdict(),
        "kernels": chosen_kernels(run),
    }
    write_event(run_dir, "resume" if begin.resumed else "start", start, **entry)
    stopped = SimpleNamespace(step=start, reason="finished")
    try:
        yield stopped
    except GeneratorExit:  # the caller of `loop.steps` has left its loop
        write_event(run_dir, "stop", stopped.step, reason="the caller stopped iterating")
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full, and the error that stopped the run is the one to show
            write_event(run_dir, "stop", stopped.step, reason=f"{type(error).__name__}: {error}")
        raise
    write_event(run_dir, "stop", stopped.step, reason=stopped.reason)


def write_event(run_dir: Path, event: str, step: int, **more: Any) -> None:
    """Append an event to `run.json`, replacing the file atomically; only the first process writes."""
    if jax.process_index():
        return
    path = run_dir / "run.json"
    events = json.loads(path.read_text(encoding="utf-8"))["events"] if path.exists() else []
    timestamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    events.append({"event": event, "time": timestamp, "step": step, **more})
    write_text(path, json.dumps({"events": events}, indent=1, ensure_ascii=False) + "\n")


def describe_process() -> dict[str, Any]:
    """Return the command line, package versions and hardware of this process, ready for JSON."""
    device = jax.devices()[0]
    return {
        "command": sys.argv,
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
