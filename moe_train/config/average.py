"""Averages of the weights of a run, which often do better than the last weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.section import Section


class NoAverage(Section):
    """No average is kept."""

    name: Literal["none"] = "none"


class ExponentialAverage(Section):
    """The exponential moving average of the weights: after each step, decay * average + (1 - decay) * weights."""

    name: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that stays at each step; about 1 / (1 - decay) steps count."""


class LastCheckpoints(Section):
    """The mean of the weights of the last `count` checkpoints, as few as there are at the beginning."""

    name: Literal["last_k"]
    count: Annotated[int, Field(ge=2, le=100)] = 3
    """Number of checkpoints; `checkpoint.keep_last` has to be at most one less."""


Average = Annotated[NoAverage | ExponentialAverage | LastCheckpoints, Field(discriminator="name")]
"""The tagged union of averages."""
