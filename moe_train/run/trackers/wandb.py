"""Weights & Biases: files in the run's folder, which `wandb sync` can send later, or a server."""

from __future__ import annotations

from typing import Any

from moe_train.run.trackers.tracker import TrackedRun


class WandbRun:
    """A run of Weights & Biases."""

    def __init__(self, tracked: TrackedRun) -> None:
        import wandb

        settings = wandb.Settings(
            mode="online" if tracked.online else "offline",
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # host name, command and user of this machine
            x_disable_stats=True,
            x_save_requirements=False,  # the packages of this machine
        )
        self._run: Any = wandb.init(
            project=tracked.project,
            entity=tracked.entity,
            dir=tracked.folder,
            id=tracked.id,
            name=tracked.name,
            config=tracked.config,
            resume="allow",
            settings=settings,
        )
        # Steps that are done again after a restart are drawn at their own place.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self._run.log({"step": step, **scalars})

    def finish(self, is_finished: bool) -> None:
        """Close the run; one that is not finished gets exit code 1."""
        self._run.finish(exit_code=0 if is_finished else 1)
