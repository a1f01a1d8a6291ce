"""Trace some steps of a run with JAX's profiler (`profile.steps`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from moe_train import config

PROFILE_FOLDER = "profile"
"""The folder of a run that holds traces: plugins/profile/TIME/HOST.xplane.pb, as xprof and TensorBoard read them."""


class StepProfiler(contextlib.AbstractContextManager["StepProfiler"]):
    """Start and stop the trace of a run. Every process traces its own devices, into a file named after its host.

    A run that continues after the last traced step traces nothing, one that continues between them traces those that are left. An
    earlier trace is kept.

    Args:
        settings: which steps are traced.
        run_dir: the folder of the run.
        total_steps: optimizer steps of the whole run.
        say: prints a line.

    Raises:
        ValueError: the run ends before the last traced step.
    """

    def __init__(self, settings: config.Profile, run_dir: Path, total_steps: int, say: Callable[[str], None]) -> None:
        self._steps = range(0)
        if settings.steps is not None:
            first, last = settings.steps
            if last > total_steps:
                raise ValueError(
                    f"profile.steps ends with step {last}, but the run has {total_steps} steps; state steps of the run"
                )
            self._steps = range(first, last + 1)
        self._folder = run_dir / PROFILE_FOLDER
        self._say = say
        self._is_tracing = False

    def before_step(self, step: int, previous: object) -> None:
        """Start the trace before its first step, once the device has finished what `previous` holds."""
        if step in self._steps and not self._is_tracing:
            # Otherwise the end of an earlier step would be part of the trace.
            jax.block_until_ready(previous)
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def after_step(self, step: int, metrics: object) -> None:
        """Stop the trace after its last step, which is waited for."""
        if self._is_tracing and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self._stop()
            self._say(f"traced the steps up to {step}; open the trace with: xprof {self._folder}")

    def _stop(self) -> None:
        self._is_tracing = False
        jax.profiler.stop_trace()

    def __exit__(self, *_: object) -> None:
        """Finish a trace that a stop or a failure has cut short, so that its steps so far can be read."""
        if self._is_tracing:
            self._stop()
