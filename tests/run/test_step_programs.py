"""A step has one program for each room of its batches, compiled when it occurs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.run import step_programs
from moe_train.run.goodput import Goodput
from moe_train.run.step_programs import StepPrograms, units_per_row


def batch(units: int) -> Any:
    class Batch(tuple):
        units: np.ndarray

    made = Batch((np.zeros((2, 8)), np.zeros((2, units, 3))))
    made.units = made[1]
    return made


def test_each_room_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile_step(definition: Any, state: Any, batch: Any, base_weights: Any) -> Any:
        compiled.append(units_per_row(batch))
        return lambda state, batch, base_weights: (state, units_per_row(batch))

    monkeypatch.setattr(step_programs, "compile_step", compile_step)
    said: list[str] = []
    definition: Any = SimpleNamespace()
    state: Any = "state"
    programs = StepPrograms(definition, Goodput(), said.append)
    rooms = [16, 8, 16, 32, 8]
    assert [programs(state, batch(units), {})[1] for units in rooms] == rooms
    assert compiled == [16, 8, 32] and "for 16 patches or chunks in a row" in said[0]
    assert units_per_row((np.zeros((2, 8)),)) == 0
