"""Stored features of the pictures or the sound of an example."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class FeaturesOfPiece(NamedTuple):
    """The features of an example, in the order of their tokens."""

    features: np.ndarray
    """(tokens, width of the text model)."""
    token: int
    """Id of the token that stands for a feature."""
