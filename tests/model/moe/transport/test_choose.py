"""The choice of a transport, against bytes counted by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from moe_train import config
from moe_train.model.moe.transport import all_gather, all_to_all, ragged_all_to_all
from moe_train.model.moe.transport.choose import choose_transport, transports_of
from moe_train.model.moe.transport.transport import TransportName
from tests.model.moe.transport.sizes import SIZES


@pytest.mark.parametrize(
    ("devices", "on", "chosen"),
    [
        *((1, "cpu", all_gather), (2, "cpu", all_gather), (4, "cpu", all_to_all), (8, "cpu", all_to_all)),
        *((2, "tpu", all_gather), (4, "tpu", ragged_all_to_all), (8, "gpu", all_to_all)),
    ],
)
def test_auto_moves_the_fewest_bytes(devices: int, on: str, chosen: object) -> None:
    assert choose_transport("auto", SIZES._replace(devices=devices), on) is chosen


def test_names_are_those_of_the_config() -> None:
    setting = config.Compute.model_fields["transport"].annotation
    assert get_args(setting) == ("auto", *get_args(TransportName))
    assert tuple(choose_transport(name, SIZES).NAME for name in transports_of("tpu")) == get_args(TransportName)
