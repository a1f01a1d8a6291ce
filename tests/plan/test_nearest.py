"""Larger topologies on which a run may fit; the nearest settings that fit are tested in test_fits.py."""

from __future__ import annotations

import pytest

from moe_train.plan.nearest import larger_topologies, smallest_that_fits
from moe_train.plan.topology import parse_topology
from tests.plan.pretraining import pretrain_run


@pytest.mark.parametrize(
    ("name", "larger"), [("h100x4", ["h100x8", "2xh100x8", "4xh100x8"]), ("v5e:4x4", ["v5e:4x8"]), ("v5p:2x2x4", ["v5p:2x4x4"])]
)
def test_larger_topologies_of_the_same_device(name: str, larger: list[str]) -> None:
    assert larger_topologies(parse_topology(name), chips=32) == larger


def test_a_run_fits_on_the_first_larger_slice_with_enough_memory() -> None:
    topology = parse_topology("v5e:2x2")
    found = smallest_that_fits(pretrain_run(), topology)
    assert found is not None and found[0].name == "v5e:8x8" and found[1].fits
    assert smallest_that_fits(pretrain_run(), topology, chips=32) is None
