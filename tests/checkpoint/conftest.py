"""The mesh on which the checkpoints of this folder are saved."""

from __future__ import annotations

import jax
import pytest

from moe_train.machine.mesh import make_mesh
from tests.checkpoint.states import MESHES
from tests.commands.conftest import small_tokenizer

__all__ = ["mesh", "small_tokenizer"]


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(MESHES["one"])):
        yield
