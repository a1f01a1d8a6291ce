"""The protocol of transports: bytes that a device receives, counted by hand."""

from __future__ import annotations

from moe_train.model.moe.transport import all_gather, all_to_all, ragged_all_to_all
from moe_train.model.moe.transport.transport import bytes_received
from tests.model.moe.transport.sizes import SIZES


def test_bytes_by_hand() -> None:
    """Balanced, all_to_all sends SLACK * A / X of the rows that all_gather does, rounded up to tiles; 5 ways of 7 devices."""
    assert bytes_received(all_gather, SIZES) == 5 * 7 * 4096 * 1024 * 2
    assert bytes_received(all_to_all, SIZES) == 5 * 7 * 1280 * 1024 * 2
    assert bytes_received(ragged_all_to_all, SIZES) == 5 * 7 * 1024 * 1024 * 2
    assert bytes_received(all_to_all, SIZES._replace(peer_capacity=1024)) == 5 * 7 * 1024 * 1024 * 2
