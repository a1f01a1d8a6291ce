"""Groups of metrics, and what becomes of values per layer and expert."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.run.metric_names import grouped, layer_values, scalars


@pytest.mark.parametrize(
    ("kind", "name", "title"),
    [
        ("train", "loss", "loss/train"),
        ("train", "cross_entropy", "loss/cross_entropy"),
        ("train", "router_z_loss", "router/z_loss"),
        ("train", "routing_drift", "router/routing_drift"),
        ("train", "tokens_per_second", "speed/tokens_per_second"),
        ("eval", "loss", "held_out/loss"),
        ("eval", "routing_drift", "held_out/routing_drift"),
        ("suite", "loss", "suites/loss"),
    ],
)
def test_groups(kind: str, name: str, title: str) -> None:
    assert grouped(kind, name) == title


def test_values_per_layer_and_expert_are_few_scalars() -> None:
    load = np.arange(2 * 128).reshape(2, 128) / 128
    names = dict(scalars("train", {"loss": 1.0, "mfu": None, "load": load.tolist(), "dropped": [1, 2], "odd": [[1], [1, 2]]}))
    assert names == {
        **{"loss/train": 1.0, "router/dropped": 1.5, "router/dropped/min": 1.0, "router/dropped/max": 2.0},
        **{"router/load/min": 0.0, "router/load/max": 255.0},
    }
    assert layer_values([]) is None and layer_values(["a"]) is None
