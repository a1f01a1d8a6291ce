"""Traces of single steps, and runs that stop or continue between them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_train import config
from moe_train.run.profiling import StepProfiler


def take_steps(run_dir: Path, steps: range, first: int = 2, last: int = 3) -> list[str]:
    """Take steps with a profiler, and return what it says."""
    lines: list[str] = []
    step_program = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    with StepProfiler(config.Profile(steps=(first, last)), run_dir, 10, lines.append) as profiler:
        for step in steps:
            profiler.before_step(step, x)
            x = step_program(x)
            profiler.after_step(step, x)
    return lines


def traces(run_dir: Path) -> list[Path]:
    return sorted(run_dir.rglob("*.xplane.pb"))


def test_the_stated_steps_are_traced_and_the_trace_names_the_program(tmp_path: Path) -> None:
    [line] = take_steps(tmp_path, range(1, 5))
    assert line == f"traced the steps up to 3; open the trace with: xprof {tmp_path / 'profile'}"
    [file] = traces(tmp_path)
    events = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for trace_line in plane.lines:
            events += [event.name for event in trace_line.events]
    assert sum("PjitFunction" in name or name == "jit_<lambda>" for name in events) >= 2, sorted(set(events))[:50]


def test_a_run_that_stops_or_continues_between_the_steps(tmp_path: Path) -> None:
    assert take_steps(tmp_path / "stopped", range(1, 3)) == []  # stopped after step 2: the trace so far can be read
    assert len(traces(tmp_path / "stopped")) == 1
    assert len(take_steps(tmp_path / "continued", range(3, 5))) == 1
    assert len(traces(tmp_path / "continued")) == 1
    assert take_steps(tmp_path / "later", range(4, 6)) == [] and not (tmp_path / "later").exists()


def test_steps_that_the_run_does_not_have_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile\.steps ends with step 12, but the run has 10 steps"):
        StepProfiler(config.Profile(steps=(10, 12)), tmp_path, 10, print)
    with StepProfiler(config.Profile(), tmp_path, 10, print) as profiler:
        profiler.before_step(1, None)
        profiler.after_step(1, None)
