"""What a checkpoint stores of a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moe_train.checkpoint import manager
from moe_train.checkpoint.metadata import WeightOrigin
from tests.checkpoint.states import (
    ABOUT,
    SETTINGS,
    new_state,
    restored,
)

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_frozen_weights_are_not_in_it(tmp_path, mesh):
    base = WeightOrigin("models/base", None, {"a": "0" * 64})
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()._replace(frozen={"large": jnp.ones((1000, 1000))})
        manager.save(checkpoints, 1, state, ABOUT._replace(base=base))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 200_000
    found = restored(tmp_path)
    assert found.state.frozen == {} and found.about.base == base
