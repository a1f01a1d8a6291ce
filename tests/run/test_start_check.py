"""Before the first step the model has to equal its reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.run.start_check import check_start
from moe_train.train.objectives.choose import objective_of
from moe_train.train.state import partition, trained_in_full
from tests.random_parameters import random_parameters
from tests.train.objectives.judged_rows import pair_rows
from tests.train.tiny_step import LORA, MODEL, ONE, structure_of

DPO = config.Preference(name="preference", sft_weight=0.5)


def start_of(parameters: Any, lora: config.Lora | None, **changes: Any) -> Any:
    """A start with these weights, whose fully trained modules are those of the base."""
    learned, frozen = partition(parameters, lora)
    state = SimpleNamespace(learned=learned, frozen=frozen)
    base_weights = trained_in_full(learned, lora) if lora else {}
    start = {"resumed": False, "adapter": None, "state": state, "base_weights": base_weights, "structure": structure_of(lora)}
    return SimpleNamespace(**(start | changes))


def check(begin: Any, batch: Any, section: Any = DPO) -> list[str]:
    run: Any = SimpleNamespace(name="run", objective=section, compute=config.Compute())
    said: list[str] = []
    with jax.set_mesh(ONE):
        check_start(run, objective_of(section), begin, put_batch(batch, ONE), said.append)
    return said


def test_adapters_that_add_nothing_pass_and_others_do_not() -> None:
    batch, _ = pair_rows()
    with jax.set_mesh(ONE):
        trained = random_parameters(MODEL, lora=LORA, scale=0.3)
        new = {path: x * 0 if path.endswith("lora_b") else x for path, x in trained.items()}
    [line] = check(start_of(new, LORA), batch)
    assert "rewards are 0 and the loss is 0.6931, as expected" in line and "differ by 0 nats at most" in line
    with pytest.raises(ValueError, match=r"run: .*should equal its reference, but .*the new adapters should add nothing yet"):
        check(start_of(trained, LORA), batch)
    assert check(start_of(trained, LORA, resumed=True), batch) == check(start_of(trained, LORA, adapter="a"), batch) == []
    assert check(start_of(trained, LORA), batch, config.Preference(name="preference", loss="simpo")) == []
    # In full training the stored values count: here there are none that could be right.
    with jax.set_mesh(ONE):
        plain = random_parameters(MODEL, scale=0.3)
    with pytest.raises(ValueError, match=r"stored reference log-probabilities .*remove the reference-\* folder"):
        check(start_of(plain, None), batch._replace(reference=np.zeros_like(batch.reference)))
