"""MLflow: a SQLite database in the run's folder, or a tracking server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moe_train.run.trackers.tracker import TrackedRun

ID_TAG = "moe_train.id"
"""Tag that holds the identity of a run, by which a resumed run is found again."""
_BATCH = 100
"""Number of parameters that MLflow takes at once."""
_LONGEST = 6000
"""Length of a parameter's value at most."""


class MlflowRun:
    """A run of MLflow, through its client, which keeps no state of its own in the process."""

    def __init__(self, tracked: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # None is the server that MLFLOW_TRACKING_URI names.
        database = None if tracked.online else f"sqlite:///{Path(tracked.folder).absolute() / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=database)
        experiment = self._client.get_experiment_by_name(tracked.project)
        if experiment is None:
            location = None if tracked.online else (Path(tracked.folder).absolute() / "artifacts").as_uri()
            experiment_id = self._client.create_experiment(tracked.project, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        earlier = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{tracked.id}'", max_results=1)
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        run = self._client.create_run(experiment_id, run_name=tracked.name, tags={ID_TAG: tracked.id})
        self._run_id = run.info.run_id
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in tracked.config.items()]
        for start in range(0, len(parameters), _BATCH):
            self._client.log_batch(self._run_id, params=parameters[start : start + _BATCH])

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Record the metrics of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, value, now, step) for name, value in scalars.items()])

    def finish(self, is_finished: bool) -> None:
        """Close the run."""
        self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")
