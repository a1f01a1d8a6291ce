"""Features of pictures and sound: computed by the tower in every step, or once and stored with the prepared sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.section import PositiveFloat, Section


class ComputedFeatures(Section):
    """Every step runs the tower on the pictures or the sound of its batch."""

    name: Literal["computed"] = "computed"


class StoredFeatures(Section):
    """A frozen tower runs once on each picture or clip; steps read its features, and do not load it.

    They are stored beside the prepared sets, in `compute.dtype`: `moe-train data prepare CONFIG --features` computes them in
    advance, and a run in one process computes what is missing before its first step.
    """

    name: Literal["stored"]
    max_gib: PositiveFloat = 64.0
    """Most GiB that the features of all sources may take; more is refused before anything is written."""


TowerFeatures = Annotated[ComputedFeatures | StoredFeatures, Field(discriminator="name")]
"""The tagged union of ways to the features."""
