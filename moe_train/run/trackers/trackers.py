"""Send the metrics of a run to its trackers, without ever waiting for them."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.machine.files import read_object, write_text
from moe_train.run.metric_names import scalars
from moe_train.run.trackers.tracker import TrackedRun
from moe_train.run.trackers.worker import QUIET

log = logging.getLogger(__name__)

IDS_FILE = "trackers.json"
"""File in the folder of a run with the identity of the run in each tracker."""
TRACKERS_FOLDER = "trackers"
"""The folder of a run that holds the files of trackers that are not online, and what they print."""
SERVERS = {"wandb": "WANDB_BASE_URL", "mlflow": "MLFLOW_TRACKING_URI", "trackio": "TRACKIO_SERVER_URL"}
"""Variable that names the server of each tracker."""
CLOSE_SECONDS = 60.0
"""Seconds that a tracker may take to send the last metrics."""
MAX_WAITING = 10_000
"""Number of records that wait for a slow tracker; further ones are left out."""


def check_trackers(sections: Sequence[config.Tracker]) -> None:
    """Check that the trackers of a run can be used, before any work is done.

    Raises:
        ValueError: a package is not installed, or no server is named.
    """
    for section in sections:
        name = section.name
        if not _is_installed(name):
            raise ValueError(
                f"metrics.trackers names {name}, whose package is not installed; run: bash launch/install.sh {name}, or pip "
                f"install 'moe-train[{name}]', or leave it out"
            )
        if section.online and not os.environ.get(SERVERS[name]):
            raise ValueError(
                f"metrics.trackers: {name} is online, but the environment variable {SERVERS[name]} names no server; set it, or "
                "leave online out to write files"
            )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory, such as `wandb` makes, is no package.
    return spec is not None and spec.origin is not None


def tracked_runs(
    sections: Sequence[config.Tracker], run_dir: Path, name: str, settings: Mapping[str, Any], is_new: bool
) -> dict[str, TrackedRun]:
    """Return what each tracker is told about the run, with the identities of an earlier start unless the run is new.

    Args:
        sections: the trackers.
        run_dir: the folder of the run, into which the identities are written.
        name: name of the run.
        settings: settings by dotted key, and hashes.
        is_new: whether the run starts at step 0.
    """
    if not sections:
        return {}
    ids: dict[str, str] = {}
    path = run_dir / IDS_FILE
    if path.exists() and not is_new:
        try:
            ids = {tracker: str(identity) for tracker, identity in read_object(path).items()}
        except ValueError as error:
            log.warning("%s, so trackers begin new runs", error)
    tracked: dict[str, TrackedRun] = {}
    for section in sections:
        identity = ids.setdefault(section.name, secrets.token_hex(8))
        folder = run_dir / TRACKERS_FOLDER / section.name
        folder.mkdir(parents=True, exist_ok=True)
        entity = section.entity if isinstance(section, config.WandbTracker) else None
        tracked[section.name] = TrackedRun(
            identity, name, section.project, section.online, str(folder.absolute()), dict(settings), entity
        )
    # Before the trackers are started, so that a run that is killed at any moment continues the same runs.
    write_text(path, json.dumps(ids, indent=1) + "\n")
    return tracked


class Trackers:
    """The trackers of a run. What goes wrong with one of them is a line, and the run goes on without it."""

    def __init__(self, tracked: Mapping[str, TrackedRun]) -> None:
        self._processes = [_TrackerProcess(name, run) for name, run in tracked.items()]

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand the metrics of a step over; this never waits.

        Args:
            kind: train, eval or suite.
            step: the step.
            metrics: metrics by name, as in `metrics.jsonl`.
        """
        values = {name: value for name, value in scalars(kind, metrics) if math.isfinite(value)}
        for process in self._processes:
            process.put({"step": step, "scalars": values})

    def close(self, is_finished: bool) -> None:
        """Let the trackers finish, for `CLOSE_SECONDS` at most.

        Args:
            is_finished: whether all steps of the run are done.
        """
        for process in self._processes:
            process.put({"end": is_finished})
        for process in self._processes:
            process.close()


class _TrackerProcess:
    """The process of one tracker, a thread that writes to it, and one that reads why it has failed."""

    def __init__(self, name: str, tracked: TrackedRun) -> None:
        self._name = name
        self._has_failed = False
        self._is_slow = False
        self._log_path = Path(tracked.folder).parent / f"{name}.log"
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue(MAX_WAITING)
        self._lines.put(tracked._asdict())
        package_root = str(Path(__file__).parents[3])
        search_path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log_path.open("ab") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moe_train.run.trackers.worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env={**os.environ, **QUIET, "PYTHONPATH": search_path},
                start_new_session=True,  # signals to the terminal's processes are for the run
            )
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._send, self._read_failure)]
        for thread in self._threads:
            thread.start()

    def put(self, message: dict[str, Any]) -> None:
        """Hand a message over; if too many wait, it is left out, which is said once."""
        if self._has_failed:
            return
        try:
            self._lines.put_nowait(message)
        except queue.Full:
            if not self._is_slow:
                self._is_slow = True
                log.warning("the tracker %s is too slow, so metrics are left out there; metrics.jsonl has all of them", self._name)

    def _send(self) -> None:
        """Write messages to the process until the last one."""
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stream:
                while True:
                    message = self._lines.get()
                    stream.write(json.dumps(message).encode() + b"\n")
                    stream.flush()
                    if "end" in message:
                        return
        except OSError:  # the process has ended; `_read_failure` says why
            return

    def _read_failure(self) -> None:
        """Wait for the process to end, and say why if that is a failure."""
        assert self._process.stdout is not None
        reason = self._process.stdout.read().decode(errors="replace").strip()
        code = self._process.wait()
        if code and not self._has_failed:
            self._has_failed = True
            said = reason.splitlines()[-1] if reason else f"its process ended with code {code}"
            log.warning("the tracker %s has failed, and the run goes on without it: %s (%s)", self._name, said, self._log_path)

    def close(self) -> None:
        """Wait for the process to end, and end it if it takes too long."""
        try:
            self._process.wait(0 if self._has_failed else CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            if not self._has_failed:
                self._has_failed = True
                log.warning("the tracker %s has not taken the last metrics within %g s and was ended", self._name, CLOSE_SECONDS)
            self._process.kill()
        for thread in self._threads:
            thread.join(5)
