"""What records an attempt: why it ends stands in the record of its time, whether it ends by itself or by an error."""

from __future__ import annotations

import contextlib

import jax
import pytest

from moe_train.machine.mesh import make_mesh
from moe_train.run.attempt import open_attempt
from moe_train.run.goodput import read_sessions
from moe_train.run.resolve import resolve
from moe_train.run.stopping import StopRequest
from moe_train.train.objectives.choose import objective_of
from tests.run_dir import events


def test_the_end_of_an_attempt_is_recorded(after_two, small_run):
    run = resolve(small_run(after_two))
    mesh = make_mesh(run.mesh)
    with pytest.raises(ZeroDivisionError), jax.set_mesh(mesh), contextlib.ExitStack() as exit_stack:
        attempt = open_attempt(run, objective_of(run.objective), mesh, StopRequest(), None, exit_stack)
        assert attempt is not None
        attempt.writer.say("a line of the writer, which is open")
        raise ZeroDivisionError
    assert read_sessions(after_two)[-1].end == "ZeroDivisionError"
    assert events(after_two)[-1]["event"] == "stop"
