"""Buckets of all_to_all by hand; its results and gradients are tested with the experts on every mesh (test_experts.py)."""

from __future__ import annotations

from moe_train.model.moe.transport import all_to_all
from moe_train.model.moe.transport.transport import Transport
from tests.model.moe.transport.sizes import SIZES


def test_whole_buckets_travel_whatever_they_hold() -> None:
    assert isinstance(all_to_all, Transport) and all_to_all.NAME == "all_to_all"
    assert all_to_all.received(SIZES) == {"all-to-all": 5 * 7 * 1280 * 1024 * 2}
    assert all_to_all.rows_at_once(SIZES) == 8 * 1280  # 8192 assignments, and a quarter more
