"""The costs of one choice, and the price of a chip."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train.machine.devices import DEVICES
from moe_train.plan.choice import dollars_per_billion, model_choice, price_of, share_of_peak
from moe_train.plan.topology import parse_topology
from tests.plan.pretraining import SMALL, pretrain_run


def test_where_a_price_comes_from() -> None:
    assert price_of(DEVICES["v5p"], 2.5) == (2.5, "--price")
    unknown = dataclasses.replace(DEVICES["v5p"], dollars_per_hour=None)
    assert price_of(unknown, None) == (None, "no list price is known; state --price")


def test_rates_follow_from_the_time_of_a_step() -> None:
    topology = parse_topology("tpu7x:2x2x1")
    choice = model_choice(pretrain_run(*SMALL), topology)
    assert choice.tokens == choice.run.train.batch_size * choice.run.train.seq_len
    assert choice.received_per_token(8) == pytest.approx(8 * choice.received / choice.tokens)
    seconds = 1e9 / choice.tokens_per_second
    assert dollars_per_billion(choice, topology, 3.0) == pytest.approx(3.0 * 4 * seconds / 3600)
    assert dollars_per_billion(choice, topology, None) is None
    assert 0 < share_of_peak(choice, topology) <= 1
