"""The compiled training step: one program for each room that rows of a batch have for pictures or sound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from moe_train.model.parameters import Parameters
from moe_train.run.goodput import Goodput
from moe_train.train.state import TrainState
from moe_train.train.step import StepMetrics, compile_step
from moe_train.train.step_definition import StepDefinition

Say = Callable[[str], None]


class StepPrograms:
    """Runs a step with the program for the shapes of its batch, which is compiled when they occur for the first time.

    Args:
        definition: what the step does.
        goodput: the stopwatch of the process.
        say: prints a line.
    """

    def __init__(self, definition: StepDefinition, goodput: Goodput, say: Say) -> None:
        self._definition = definition
        self._goodput = goodput
        self._say = say
        self._programs: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def compile(self, state: TrainState, batch: Any, base_weights: Parameters) -> jax.stages.Compiled:
        """Return the program for batches like this one; compile it if there is none yet."""
        key = tuple(array.shape for array in batch)
        if key not in self._programs:
            start_time = time.perf_counter()
            with self._goodput.during("compile"):
                self._programs[key] = compile_step(self._definition, state, batch, base_weights)
            room = f" for {units} patches or chunks in a row" if (units := units_per_row(batch)) else ""
            self._say(f"compiled the step{room} in {time.perf_counter() - start_time:.1f} s")
        return self._programs[key]

    def __call__(self, state: TrainState, batch: Any, base_weights: Parameters) -> tuple[TrainState, StepMetrics]:
        """Take a step, which takes over (donates) the state."""
        return self.compile(state, batch, base_weights)(state, batch, base_weights)


def units_per_row(batch: Any) -> int:
    """Return the patches or chunks that a row of a batch has room for; 0 for a batch that no tower reads."""
    return batch.units.shape[1] if hasattr(batch, "units") else 0
