"""A sequence split over several devices: equal work, and the results of one device."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.attention import context_parallel
from tests.model.attention.against_reference import check, operands


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("kernel", "T"), [("reference", 48), ("blocked", 600), ("splash", 1024)])
def test_a_sequence_on_several_devices(kernel: str, T: int, window: int | None) -> None:
    """Segments lie across the cuts; keys are gathered, and their gradients sent back to where they came from."""
    check(kernel, window, operands(T), 1e-5, make_mesh(config.Mesh(context=4, tensor=2)))


def test_an_odd_number_of_parts() -> None:
    check("blocked", 50, operands(60), 1e-5, make_mesh(config.Mesh(context=3), jax.devices()[:3]))


@pytest.mark.parametrize("c", [1, 2, 3, 4, 8])
def test_every_device_attends_to_as_many_pairs(c: int) -> None:
    """And every query has one device."""
    T = 16 * c
    with jax.set_mesh(make_mesh(config.Mesh(context=c), jax.devices()[:c])):
        parts = context_parallel.run_starts(T)
    run = T // c // len(parts[0])
    queries = [[t for start in starts for t in range(start, start + run)] for starts in parts]
    assert sorted(t for device in queries for t in device) == list(range(T))
    assert len({sum(t + 1 for t in device) for device in queries}) == 1
