"""Mistral's own layout has rotary pairs side by side."""

from __future__ import annotations

from moe_train.weights import names
from tests.weights.names.rotary import check_rotary_pairs


def test_rotary_pairs_lie_side_by_side() -> None:
    check_rotary_pairs(names.MISTRAL, "attention.wq.weight", "attention.wk.weight")
