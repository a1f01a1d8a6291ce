"""The process of one tracker: `python -m moe_train.run.trackers.worker NAME` reads lines of JSON from stdin.

The first line is a `TrackedRun`, then each is {"step": …, "scalars": {…}}, and the last {"end": true or false}. A line on stdout
says why the tracker has failed. If the run dies, stdin ends, and the tracker's run is closed as not finished.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import assert_never, get_args

from moe_train.config.trackers import MlflowTracker, TrackioTracker, WandbTracker
from moe_train.run.trackers.mlflow import MlflowRun
from moe_train.run.trackers.tracker import TrackedRun, Tracker
from moe_train.run.trackers.trackio import TrackioRun
from moe_train.run.trackers.wandb import WandbRun

QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment of the process: trackers report errors and usage to their makers otherwise."""

TrackerName = WandbTracker | MlflowTracker | TrackioTracker
"""The sections of the trackers, whose tag names them."""


def open_tracker(name: str, tracked: TrackedRun) -> Tracker:
    """Open a run of the tracker of this name."""
    section = next(kind for kind in get_args(TrackerName) if get_args(kind.model_fields["name"].annotation) == (name,))
    tracker = section(name=name)
    match tracker:
        case WandbTracker():
            return WandbRun(tracked)
        case MlflowTracker():
            return MlflowRun(tracked)
        case TrackioTracker():
            return TrackioRun(tracked)
        case _:
            assert_never(tracker)


def work(name: str, lines: Iterable[str]) -> None:
    """Log lines to a tracker until they end."""
    iterator = iter(lines)
    tracker = open_tracker(name, TrackedRun(**json.loads(next(iterator))))
    is_finished = False
    for line in iterator:
        # The run was killed while it wrote.
        if not line.endswith("\n"):
            break
        message = json.loads(line)
        if "end" in message:
            is_finished = bool(message["end"])
            break
        tracker.log(message["step"], message["scalars"])
    tracker.finish(is_finished)


def main() -> None:
    """Run the process; what trackers print goes to stderr, so that stdout holds the reason of a failure alone."""
    # A signal to the terminal's processes is for the run, which ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        work(sys.argv[1], sys.stdin)
    except Exception as error:  # whatever a tracker raises is said in one line by the run
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", file=answers, flush=True)
        raise


if __name__ == "__main__":
    main()
