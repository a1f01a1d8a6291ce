"""Rows of ragged_all_to_all by hand; its results and gradients are tested with the experts on every mesh (test_experts.py)."""

from __future__ import annotations

from moe_train.model.moe.transport import ragged_all_to_all
from moe_train.model.moe.transport.transport import Transport
from tests.model.moe.transport.sizes import SIZES


def test_only_rows_that_exist_travel_into_a_buffer_with_slack() -> None:
    assert isinstance(ragged_all_to_all, Transport) and ragged_all_to_all.NAME == "ragged_all_to_all"
    assert ragged_all_to_all.received(SIZES) == {"ragged-all-to-all": 5 * 7 * 1024 * 1024 * 2}
    assert ragged_all_to_all.rows_at_once(SIZES) == 8 * 1280
