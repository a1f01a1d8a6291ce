"""The spike guard against numpy's median, and through a checkpoint's JSON."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.train.spike_guard import guard_of_json, guard_step, guard_to_json
from tests.meshes import mesh_of

SETTINGS = config.SpikeGuard(action="skip", window=5, factor=3.0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(mesh_of(config.Mesh())):
        yield


def expected(values: list[float], window: int, factor: float) -> list[bool]:
    """The definition, with numpy."""
    recent: list[float] = []
    spikes = []
    for value in values:
        full = len(recent) >= window
        median = np.median(recent[-window:]) if full else 0.0
        deviation = max(1.4826 * np.median(np.abs(np.array(recent[-window:]) - median)), 0.01 * abs(median)) if full else 0.0
        is_spike = math.isfinite(value) and full and value > median + factor * deviation
        spikes.append(is_spike)
        if math.isfinite(value) and not is_spike:
            recent.append(value)
    return spikes


def run(values: list[float], settings: config.SpikeGuard = SETTINGS) -> tuple[list[bool], dict]:
    guard = guard_of_json(settings, None)
    step = jax.jit(lambda guard, x: guard_step(settings, guard, x, jnp.isfinite(x)))
    spikes = []
    for value in values:
        guard, spike = step(guard, jnp.float32(value))
        spikes.append(bool(spike.is_spike))
    return spikes, guard_to_json(guard)


def test_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    values = (3 + 0.1 * rng.normal(size=80)).tolist()
    values[2] = 50.0  # before the window is full
    values[20] = values[21] = 9.0
    values[40] = math.nan
    values[60] = 3.9
    spikes, state = run(values)
    assert spikes == expected(values, 5, 3.0) and {20, 21, 60} <= {i for i, is_spike in enumerate(spikes) if is_spike}
    assert state["spikes"] == state["discarded"] == sum(spikes)


def test_a_flat_curve_has_no_spikes_and_a_falling_one_neither() -> None:
    assert not any(run([2.0, 2.01] * 10)[0])
    assert not any(run([8.0 - 0.3 * i for i in range(20)])[0])


def test_json_keeps_every_bit_and_the_newest_values_of_another_window() -> None:
    _, state = run([1 / 3, 0.1, math.pi, 7.7])
    assert len(state["recent"]) == 4
    saved = json.loads(json.dumps(state))
    assert guard_to_json(guard_of_json(SETTINGS, saved)) == state
    shorter = guard_to_json(guard_of_json(SETTINGS.model_copy(update={"window": 4}), {**saved, "recent": [9.0, *saved["recent"]]}))
    assert shorter == state
