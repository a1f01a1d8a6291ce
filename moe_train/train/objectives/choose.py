"""Selection of the objective that a config names."""

from __future__ import annotations

from moe_train import config
from moe_train.data.batches.feature_batch import FeatureShape, feature_batch
from moe_train.data.batches.media_batch import media_batch
from moe_train.train.objectives.classification import classification
from moe_train.train.objectives.distillation import distillation
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Objective
from moe_train.train.objectives.preference import preference
from moe_train.train.objectives.reward import reward
from moe_train.train.objectives.unpaired_preference import unpaired_preference


def objective_of_run(run: config.Run) -> Objective:
    """Return the objective of a resolved run, whose batches have features where these are stored."""
    media = run.media
    if media is None:
        return objective_of(run.objective)
    if run.stored_features is None:
        return next_token(media_batch(media.encoder, media.units_per_row, run.rooms))
    shape = FeatureShape(run.model.model_dim, run.compute.dtype)
    return next_token(feature_batch(media.encoder, media.units_per_row, shape, run.rooms))


def objective_of(objective: config.Objective, media: config.RunVision | config.RunAudio | None = None) -> Objective:
    """Return the objective of a config section.

    Args:
        objective: the section.
        media: the resolved section on pictures or on sound; None without either.
    """
    match objective:
        case config.Classification():
            return classification(objective)
        case config.Distillation():
            return distillation(objective)
        case config.NextToken():
            if media is None:
                return next_token()
            return next_token(media_batch(media.encoder, media.units_per_row))
        case config.Preference():
            return preference(objective)
        case config.Reward():
            return reward(objective)
        case config.UnpairedPreference():
            return unpaired_preference(objective)
