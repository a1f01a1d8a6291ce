"""Stored features of an example name the token that stands for them."""

from __future__ import annotations

import numpy as np

from moe_train.data.prepared.feature_values import FeaturesOfPiece


def test_features_keep_their_dtype() -> None:
    piece = FeaturesOfPiece(np.zeros((2, 3), np.float32), 7)
    assert piece.features.dtype == np.float32 and piece.token == 7
