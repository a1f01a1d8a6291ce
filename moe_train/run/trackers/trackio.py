"""Trackio: a SQLite database in the run's folder, or a server of one's own."""

from __future__ import annotations

import os
from typing import Any

from moe_train.run.trackers.tracker import TrackedRun

_DESTINATIONS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL")
"""Variables that would make Trackio send what it logs."""


class TrackioRun:
    """A run of Trackio, which reads its settings from the environment of the process when it is imported."""

    def __init__(self, tracked: TrackedRun) -> None:
        if not tracked.online:
            for variable in _DESTINATIONS:
                os.environ.pop(variable, None)
            os.environ["TRACKIO_DIR"] = tracked.folder
        import trackio

        self._run: Any = trackio.init(
            project=tracked.project,
            # Trackio knows a run by its name alone.
            name=f"{tracked.name}-{tracked.id}",
            config=tracked.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self._run.log(scalars, step=step)

    def finish(self, is_finished: bool) -> None:
        """Close the run."""
        self._run.finish()
