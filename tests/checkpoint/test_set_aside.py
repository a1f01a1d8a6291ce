"""Checkpoints that a run cannot continue from make way for an older one."""

from __future__ import annotations

import pytest

from moe_train.checkpoint import manager
from moe_train.checkpoint.set_aside import set_newer_aside, set_unusable_aside
from tests.checkpoint.states import (
    SETTINGS,
    save_steps,
    steps_in,
)

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_an_unusable_checkpoint_makes_way_for_an_older_one_only(tmp_path, mesh):
    save_steps(tmp_path, {1: None, 2: None})
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        assert set_unusable_aside(checkpoints, 2) == 1 and checkpoints.all_steps() == [1]
        assert steps_in(tmp_path) == ["1", "unusable-2"]
        assert set_unusable_aside(checkpoints, 1) is None and steps_in(tmp_path) == ["1", "unusable-2"]


def test_checkpoints_after_a_spike_make_way_for_the_newest_regular_one_before_it(tmp_path, mesh):
    save_steps(tmp_path, {2: 1.0, 3: 2.0, 4: 3.0})
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        assert set_newer_aside(checkpoints, newest=1, every_steps=1) is None
        assert steps_in(tmp_path) == ["2", "3", "4"]
        # Step 3 was not saved at a multiple of two steps, so it does not count.
        assert set_newer_aside(checkpoints, newest=3, every_steps=2) == 2
        assert steps_in(tmp_path) == ["2", "spike-3", "spike-4"] and checkpoints.all_steps() == [2]
