"""The identity of the weights that a run started from."""

from __future__ import annotations

import shutil

import pytest

from moe_train.checkpoint import identity
from tests.checkpoint.states import damage, save_steps


def test_a_changed_base_is_refused(tmp_path, mesh):
    save_steps(tmp_path, {1: None, 2: None})
    base = identity.base_origin(tmp_path)
    assert base.source == str(tmp_path) and base.step == 2 and all(len(digest) == 64 for digest in base.hashes.values())
    identity.check_base(base)
    damage(tmp_path / "checkpoints" / "2" / "params", "flipped bits")
    with pytest.raises(
        ValueError, match=r"base weights in .* have changed since this run started \([0-9]+ tensors or files, the first"
    ):
        identity.check_base(base)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(FileNotFoundError, match="is missing, which has the weights that this run's adapters belong to"):
        identity.check_base(base)
