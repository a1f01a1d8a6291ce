"""Saving a small state: which checkpoints stay, and what a full disk or a kill leaves."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.checkpoint import manager
from tests.checkpoint.states import (
    ABOUT,
    SETTINGS,
    changed,
    new_state,
    numpy_of,
    restored,
    same,
    save_steps,
    steps_in,
)

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_donated_state_does_not_change_what_is_being_saved(tmp_path, mesh):
    donating = jax.jit(lambda state: changed(state), donate_argnums=0)
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()
        wanted = numpy_of(state)
        manager.save(checkpoints, 1, state, ABOUT)
        for _ in range(5):
            state = donating(state)
    assert same(restored(tmp_path).state, wanted)


def test_the_last_and_the_best_stay(tmp_path, mesh):
    save_steps(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 4.0})
    assert steps_in(tmp_path) == ["2", "5", "6"]
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        assert manager.best_rank(checkpoints) == 1.0
        manager.save(checkpoints, 7, jax.jit(new_state)(), ABOUT, 0.5)
    assert steps_in(tmp_path) == ["6", "7"]


def test_without_the_best(tmp_path, mesh):
    settings = config.Checkpoint(keep_last=1, keep_best=False)
    with manager.open_for_saving(tmp_path, settings) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            manager.save(checkpoints, step, jax.jit(new_state)(), ABOUT, loss)
        manager.finish_saving(checkpoints)
        # Weights can be ruined although they were saved, so the one before goes when the next save begins.
        assert steps_in(tmp_path) == ["1", "2"]
        manager.save(checkpoints, 3, jax.jit(new_state)(), ABOUT)
    assert steps_in(tmp_path) == ["2", "3"]


def test_with_the_best_and_the_last(tmp_path, mesh):
    with manager.open_for_saving(tmp_path, config.Checkpoint(keep_last=1)) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)):
            manager.save(checkpoints, step, jax.jit(new_state)(), ABOUT, loss)
            manager.finish_saving(checkpoints)
    assert steps_in(tmp_path) == ["2", "4", "5"]


def test_nothing_is_made_before_the_first_save(tmp_path, mesh):
    assert restored(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_what_a_killed_save_left_is_cleared_away(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None})
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert same(restored(tmp_path).state, saved[1])
    save_steps(tmp_path, {2: None})
    assert steps_in(tmp_path) == ["1", "2"]


@contextmanager
def full_disk(limit: int = 2000):
    """No file grows past `limit` bytes: writing fails as it does on a full disk, in all threads."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None})
    with pytest.raises(RuntimeError) as caught, manager.open_for_saving(tmp_path, SETTINGS) as checkpoints, full_disk():
        manager.save(checkpoints, 2, changed(jax.jit(new_state)()), ABOUT)
        manager.finish_saving(checkpoints)
    said = str(caught.value)
    assert said.startswith(f"could not save a checkpoint in {tmp_path}") and said.endswith("the checkpoint of step 1 is intact")
    assert "\n" not in said and len(said) < 500
    assert steps_in(tmp_path) == ["1"]
    assert same(restored(tmp_path).state, saved[1])


def test_a_full_disk_prints_no_traceback(tmp_path):
    code = f"""
import jax, pathlib
jax.config.update("jax_num_cpu_devices", 8)
from moe_train.machine.mesh import make_mesh
from moe_train.checkpoint import manager
from tests.checkpoint.states import *
from tests.checkpoint.test_manager import full_disk
run_dir = pathlib.Path({str(tmp_path)!r})
with jax.set_mesh(make_mesh(MESHES["one"])):
    save_steps(run_dir, {{1: None}})
    try:
        with manager.open_for_saving(run_dir, SETTINGS) as checkpoints, full_disk():
            manager.save(checkpoints, 2, changed(jax.jit(new_state)()), ABOUT)
            manager.finish_saving(checkpoints)
    except RuntimeError:
        print("failed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "failed\n"
    assert "Traceback" not in done.stderr and "Event loop" not in done.stderr
