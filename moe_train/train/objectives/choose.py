"""Selection of the objective that a config names."""

from __future__ import annotations

from moe_train import config
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Objective


def objective_of(objective: config.Objective) -> Objective:
    """Return the objective of a config section."""
    match objective:
        case config.NextToken():
            return next_token()
