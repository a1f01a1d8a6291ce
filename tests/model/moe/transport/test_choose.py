"""The choice of a transport, against bytes counted by hand."""

from __future__ import annotations

from functools import partial

from moe_train.model.moe.transport import choose as transport


def test_auto_moves_the_fewest_bytes() -> None:
    """Balanced, all_to_all sends SLACK * A / X of the rows that all_gather does; the whole is rounded up to tiles."""
    *_, along = several = [transport.AlongExpert(4096, 1024, 2, devices) for devices in (1, 2, 4, 8)]
    choose = partial(transport.choose_transport, "auto")
    assert [choose(each) for each in several] == ["all_gather", "all_gather", "all_to_all", "all_to_all"]
    assert [choose(each, on="tpu") for each in several] == ["all_gather"] * 2 + ["ragged_all_to_all"] * 2
    assert transport.transport_bytes("all_gather", along) == 5 * 7 * 4096 * 1024 * 2
    assert transport.transport_bytes("all_to_all", along) == 5 * 7 * 1280 * 1024 * 2
    assert transport.transport_bytes("ragged_all_to_all", along) == 5 * 7 * 1024 * 1024 * 2
    assert transport.transport_bytes("all_to_all", along._replace(most=1024)) == 5 * 7 * 1024 * 1024 * 2
