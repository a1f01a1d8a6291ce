"""Compute and energy: counted by hand, beside a stated base; what is not known says TODO."""

from __future__ import annotations

import pytest

from moe_train.governance.compute import training_flops
from moe_train.governance.ledger import NOTHING_STATED, StatedFigures, ledger_of, ledger_page
from tests.governance.lineages import lineage_of


def test_energy_is_power_times_devices_times_hours_and_the_share_is_of_all_that_was_trained_before(tmp_path):
    training = lineage_of(tmp_path, lora=True).training
    flops = training_flops(training)
    ledger = ledger_of([training], StatedFigures(base_flops=6 * flops, power_watts=500.0))
    assert ledger.energy_kwh == pytest.approx(500 * 16 * 1.5 / 1000)
    assert ledger.to_json()["third_of_base_flops"] == pytest.approx(2 * flops)
    page = ledger_page(training, ledger)
    assert "| this training, as a share of the base | 0.167 |" in page and "| is it more than a third | no |" in page
    # An earlier training here counts with the external base that it started from.
    twice = ledger_of([training, training], StatedFigures(base_flops=flops))
    assert twice.flops_before == flops and twice.to_json()["third_of_base_flops"] == pytest.approx(2 * flops / 3)
    assert "| is it more than a third | yes |" in ledger_page(training, twice)


def test_what_is_not_known_is_a_todo(tmp_path):
    training = lineage_of(tmp_path, lora=True).training._replace(seconds=None, sessions=())
    page = ledger_page(training, ledger_of([training], NOTHING_STATED))
    for field in ("hardware", "time", "power of a device", "energy", "external base"):
        assert f"| {field} | TODO" in page
    assert "3.33e+22 FLOP" in page
