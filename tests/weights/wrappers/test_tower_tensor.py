"""A row of a tower's table: what is left out has no native name and the same order of rows in both layouts."""

from __future__ import annotations

from moe_train.weights.wrappers.tower_tensor import TowerTensor


def test_a_tensor_without_a_native_name() -> None:
    row = TowerTensor("audio_tower.embed_positions.weight", (4, 2))
    assert row.native is None and row.heads == 0
