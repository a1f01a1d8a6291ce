"""Experiment trackers that receive the metrics of a run besides the files in its folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.section import Section

TrackerText = Annotated[str, Field(min_length=1, max_length=128)]
"""Name of a project or group in a tracker."""


class TrackerSection(Section):
    """What all trackers have in common."""

    project: TrackerText = "moe_train"
    """Project (MLflow: experiment) to which the run belongs."""
    online: bool = False
    """Whether metrics are sent to the server that an environment variable names. By default they are written to files in the run's
    folder, and nothing is sent.
    """


class WandbTracker(TrackerSection):
    """Weights & Biases (extra `wandb`). Server: WANDB_BASE_URL. `wandb sync` sends the files later."""

    name: Literal["wandb"]
    entity: TrackerText | None = None
    """User or team that owns the project; null for the default of the account."""


class MlflowTracker(TrackerSection):
    """MLflow (extra `mlflow`). Server: MLFLOW_TRACKING_URI. Without one, a SQLite database in the run's folder."""

    name: Literal["mlflow"]


class TrackioTracker(TrackerSection):
    """Trackio (extra `trackio`). Server: TRACKIO_SERVER_URL. Without one, a SQLite database in the run's folder."""

    name: Literal["trackio"]


Tracker = Annotated[WandbTracker | MlflowTracker | TrackioTracker, Field(discriminator="name")]
"""The tagged union of trackers."""
