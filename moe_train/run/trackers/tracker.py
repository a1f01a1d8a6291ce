"""The interface of a tracker in its own process, and what it is told about the run."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """A run as a tracker shows it; it travels to the tracker's process as JSON."""

    id: str
    """Identity of the run in the tracker, which a resumed run keeps."""
    name: str
    project: str
    online: bool
    folder: str
    """Folder for the tracker's files if it is not online."""
    config: dict[str, Any]
    """Settings by dotted key, and hashes of config, data and code."""
    entity: str | None = None
    """User or team that owns the project, where the tracker has such."""


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Record the metrics of a step."""

    def finish(self, is_finished: bool) -> None:
        """Close the run.

        Args:
            is_finished: whether all steps are done; otherwise it may be continued.
        """
