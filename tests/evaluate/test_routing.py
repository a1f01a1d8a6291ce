"""Assignments that differ from those of the base model."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.evaluate.held_out import evaluate_held_out
from moe_train.evaluate.routing import Drift, DriftSums, drift_sums
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import with_expert_ids
from moe_train.train.objectives.next_token import next_token
from tests.evaluate.two_batches import HALVES, LOADER
from tests.random_parameters import random_parameters
from tests.train.tiny_step import LORA, MODEL, ONE, structure_of

ROUTER = "stacks.0.layers.0.ffn.router.weight"


def test_assignments_are_compared_with_those_of_the_base() -> None:
    """A router of the opposite sign chooses the other two of four experts in the first layer; the adapters change nothing."""
    run = jax.jit(partial(drift_sums, structure=with_expert_ids(structure_of(LORA)), objective=next_token()))
    with jax.set_mesh(ONE):
        params = random_parameters(MODEL, lora=LORA, scale=0.3)
        adapters = {path: 0 * x for path, x in params.items() if "lora_" in path}
        frozen = {path: x for path, x in params.items() if path not in adapters and path != ROUTER}
        rows = put_batch(HALVES[0], ONE)
        learned = {**adapters, ROUTER: params[ROUTER]}
        same, opposite = (jax.device_get(run(learned, frozen, rows, {ROUTER: sign * params[ROUTER]})[0]) for sign in (1, -1))
    assert same.assignments == opposite.assignments == 2 * np.sum(HALVES[0].segment_ids != 0)
    assert not same.changed_L.any()
    assert opposite.changed_L[0] == opposite.assignments
    assert (same.load_LE.sum(axis=1) == same.assignments).all()


def test_shares_are_of_all_compared_batches() -> None:
    """Of the first batches alone; an expert is dead below 1% of an even share."""
    counts = iter(
        [
            DriftSums(np.array([10, 0]), np.array([[50, 50, 0, 0], [25, 25, 25, 25]]), np.array(100)),
            DriftSums(np.array([30, 0]), np.array([[50, 49, 0, 1], [25, 25, 25, 25]]), np.array(100)),
        ]
    )
    drift: Any = Drift(lambda *_: (next(counts), {"loss": np.float32(1)}), {}, batches=2)
    sums: Any = SimpleNamespace()  # is not called
    found = evaluate_held_out(sums, {}, {}, LOADER, ONE, drift=drift)
    assert found == {"loss": 2, "routing_drift": [0.2, 0], "dead_experts": [0.25, 0]}
    assert next(counts, None) is None


@pytest.mark.parametrize("batches", [1, 2])
def test_later_batches_are_read_once(batches: int) -> None:
    compared = DriftSums(np.array([5]), np.array([[10, 10]]), np.array(20))
    drift = Drift(lambda *_: (compared, {"loss": np.float32(1)}), {}, batches)
    found = evaluate_held_out(lambda *_: {"loss": np.float32(10)}, {}, {}, LOADER, ONE, drift=drift)
    assert found["loss"] == {1: 11, 2: 2}[batches] and found["routing_drift"] == [0.25]
