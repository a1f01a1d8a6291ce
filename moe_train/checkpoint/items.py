"""The items of a checkpoint: which parts of the training state are stored under which name."""

from __future__ import annotations

from typing import Any

from moe_train.train.state import TrainState


def params_of(state: TrainState) -> Any:
    """Return the part of the state that a checkpoint stores as `params`."""
    return state.learned


def optimizer_of(state: TrainState) -> Any:
    """Return the part of the state that a checkpoint stores as `optimizer`."""
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
