"""Which steps of a run are traced by the profiler."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from moe_train.config.section import Positive, Section


class Profile(Section):
    """Trace some steps with JAX's profiler, into the folder `profile` of the run, for xprof or Perfetto."""

    steps: tuple[Positive, Positive] | None = None
    """First and last step that are traced, both included; null for none. A few steps after the first ones are enough: a trace of a
    step takes megabytes, and steps are slower while they are traced.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            first, last = self.steps
            raise ValueError(f"steps [{first}, {last}] begin after they end; state the first and the last step")
        return self
