"""`run.json`: the diary of a run, one entry for each start, resume and stop."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
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

PACKAGES = ("moe-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Keep a second job from the same machine out of `run_dir`, which exists, until this one has left it.

    Raises ValueError where another one is in there. The lock dies with its process, however that ends.
    """
    with (run_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {run_dir}; wait for it, or choose another run_dir") from None
        yield


@contextlib.contextmanager
def diary(run: config.Config, run_dir: Path, start: int, resumed: bool, **more: Any) -> Iterator[SimpleNamespace]:
    """Write down in `run.json` how the run starts, and how it stops."""
    digest = hashlib.sha256(yaml_file.dump(run).encode()).hexdigest()
    write_event(run_dir, "resume" if resumed else "start", start, **surroundings(), config_sha256=digest, **more)
    stopped = SimpleNamespace(step=start, reason="finished")
    try:
        yield stopped
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full: the error that stopped the run is the one to show
            write_event(run_dir, "stop", stopped.step, reason=f"{type(error).__name__}: {error}")
        raise
    write_event(run_dir, "stop", stopped.step, reason=stopped.reason)


def write_event(run_dir: Path, event: str, step: int, **more: Any) -> None:
    """Append an event to `run.json`; on processes but the first, do nothing. The file is replaced whole."""
    if jax.process_index():
        return
    path = run_dir / "run.json"
    events = json.loads(path.read_text(encoding="utf-8"))["events"] if path.exists() else []
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    events.append({"event": event, "time": now, "step": step, **more})
    write_text(path, json.dumps({"events": events}, indent=1, ensure_ascii=False) + "\n")


def surroundings() -> dict[str, Any]:
    """The command, the versions and the hardware of this process."""
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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
