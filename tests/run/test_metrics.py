"""Metrics of steps: routers, dropped assignments, the wait for data."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from moe_train import config
from moe_train.commands.train import train
from moe_train.data.batches.loader import Loader
from moe_train.model.moe.router import RouterStats
from moe_train.run import loop, metrics
from moe_train.run.metrics import check_dropped
from tests.run_dir import lines


def test_router_figures_stay_per_layer():
    chosen = np.array([[2, 2, 2, 2], [4, 4, 0, 0]])
    ones = np.ones(2)
    found = metrics.router_metrics(RouterStats(chosen, ones, ones, np.array([math.log(4), 0.1]), np.array([0, 3])))
    assert found["dead_experts"] == [0.0, 0.5]
    assert found["balance"] == 2.0 and found["dropped"] == [0, 3]
    assert found["router_entropy"] == [pytest.approx(math.log(4), abs=1e-5), 0.1]
    assert [sum(row) for row in found["load"]] == [1.0, 1.0]


def test_a_layer_that_drops_is_named() -> None:
    nothing = np.zeros(2)
    routers = RouterStats(np.full((2, 4), 25), nothing, nothing, nothing, np.array([1, 3]))
    bounded = {"batch_size": 8, "seq_len": 8, "steps": 1, "capacity_factor": 1.0}
    check_dropped(5, routers, config.Train(**bounded, max_drop_rate=0.03), [3, 4])
    with pytest.raises(RuntimeError, match=r"step 5: layer 4 dropped 3.00% of its assignments; train.max_drop_rate is 2.90%"):
        check_dropped(5, routers, config.Train(**bounded, max_drop_rate=0.029), [3, 4])
    with pytest.raises(RuntimeError, match=r"layer 4 dropped 3.00% of its assignments although no capacity is set, which is a bug"):
        check_dropped(5, routers, config.Train(batch_size=8, seq_len=8, steps=1), [3, 4])


def test_a_slow_source_is_seen(small_run, tmp_path: Path, monkeypatch) -> None:
    original = Loader.iterate

    def slowly(self, start: int = 0):
        for batch in original(self, start):
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(Loader, "iterate", slowly)
    assert train(small_run(tmp_path / "run", train__steps=4, checkpoint__every_steps=4)) == loop.FINISHED
    assert max(step["input_wait"] for step in lines(tmp_path / "run")) > 0.3
