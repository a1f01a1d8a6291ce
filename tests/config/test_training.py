"""The length and shape of training, by values just beyond their limits."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from tests.config.tiny import refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epochs": 1}, "exactly one of steps, epochs, tokens (stated: steps, epochs"),
        ({"train.steps": ...}, "exactly one of steps, epochs, tokens (stated: none"),
        ({"train.steps": ..., "train.tokens": 255}, "tokens 255 is less than one step of 256"),
        ({"train.microbatches": 3}, "batch_size 8 is not a multiple of microbatches 3"),
        ({"train.capacity_factor": 1.25}, "state max_drop_rate with capacity_factor"),
        ({"train.max_drop_rate": 0.1}, "max_drop_rate has no effect without a capacity_factor"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


def test_one_step_of_tokens_is_enough() -> None:
    assert config.Train(tokens=256, batch_size=8, seq_len=32).tokens == 256


def test_a_spike_guard_without_effect_is_refused() -> None:
    guard = {"action": "skip", "window": 4}
    assert "spike_guard.window 4 is never full in 4 steps" in refusal(**{"train.spike_guard": guard, "train.steps": 4})
    guard |= {"steps_back": 2}
    assert "steps_back has no effect with action skip" in refusal(**{"train.spike_guard": guard, "train.steps": 9})
