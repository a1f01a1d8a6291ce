"""Attempts at a run: none is opened where all steps are done, and another one starts from the newest checkpoint."""

from __future__ import annotations

import contextlib

import jax

from moe_train.machine.mesh import make_mesh
from moe_train.run.attempt import Attempt, open_attempt
from moe_train.run.resolve import resolve
from moe_train.run.stopping import StopRequest
from moe_train.train.objectives.choose import objective_of
from tests.run_dir import events


def opened(run, exit_stack) -> Attempt | None:
    """Open an attempt at a run under its own mesh."""
    mesh = make_mesh(run.mesh)
    exit_stack.enter_context(jax.set_mesh(mesh))
    return open_attempt(run, objective_of(run.objective), mesh, StopRequest(), None, exit_stack)


def test_all_steps_done_open_no_attempt(finished, small_run):
    events_before = events(finished)
    with contextlib.ExitStack() as exit_stack:
        assert opened(resolve(small_run(finished)), exit_stack) is None
    assert events(finished) == events_before


def test_an_attempt_starts_from_the_newest_checkpoint(after_two, small_run):
    with contextlib.ExitStack() as exit_stack:
        attempt = opened(resolve(small_run(after_two)), exit_stack)
        assert attempt is not None and attempt.start == 2 and attempt.total_steps == 6
        assert int(attempt.begin.state.step) == 2 and attempt.begin.resumed
    assert [event["event"] for event in events(after_two)][-2:] == ["resume", "stop"]
