"""Selection of the objective that a config names."""

from __future__ import annotations

from moe_train import config
from moe_train.data.batches.picture_batch import picture_batch
from moe_train.train.objectives.classification import classification
from moe_train.train.objectives.distillation import distillation
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Objective
from moe_train.train.objectives.preference import preference
from moe_train.train.objectives.reward import reward
from moe_train.train.objectives.unpaired_preference import unpaired_preference


def objective_of(objective: config.Objective, vision: config.RunVision | None = None) -> Objective:
    """Return the objective of a config section.

    Args:
        objective: the section.
        vision: the resolved section on pictures; None without pictures.
    """
    match objective:
        case config.Classification():
            return classification(objective)
        case config.Distillation():
            return distillation(objective)
        case config.NextToken():
            if vision is None:
                return next_token()
            return next_token(picture_batch(vision.encoder, vision.patches_per_row))
        case config.Preference():
            return preference(objective)
        case config.Reward():
            return reward(objective)
        case config.UnpairedPreference():
            return unpaired_preference(objective)
