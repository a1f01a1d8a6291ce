"""What runs have trained of the tower and projector that they started from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.initial_files import runs_from
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.train.state import partition


class TrainedTowerPaths(NamedTuple):
    """What training has changed of a tower and its projector."""

    encoder: config.Encoder | None
    """Sizes of the tower; None if nothing of it was trained."""
    paths: frozenset[str]
    """Paths of what was trained in full, of adapters, and of the weights that these adapt."""


def trained_tower_paths(directory: str | Path) -> TrainedTowerPaths:
    """Return what the run in `directory`, and the runs that it started from, have trained of a tower; a mesh is in force."""
    encoder: config.Encoder | None = None
    paths: set[str] = set()
    for run in runs_from(directory):
        if not run.trains_tower:
            continue
        encoder = run.encoder
        _, shapes = parameters(abstract_model(run.model, run.compute, run.lora, encoder))
        learned, _ = partition(shapes, run.lora, run.trained_tower)
        for name in learned:
            path = ParameterPath.parse(name)
            if path.is_tower:
                paths |= {name, path.weight} if path.is_adapter else {name}
    return TrainedTowerPaths(encoder, frozenset(paths))
