"""Features stand where the tokens of their pictures do, as where the tower computes them in the step."""

from __future__ import annotations

import numpy as np

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.feature_batch import FeatureShape, feature_batch
from moe_train.data.batches.media_batch import media_batch
from moe_train.data.prepared.feature_values import FeaturesOfPiece
from tests.commands.audio_wrapper import ENCODER

VISION = config.VisionEncoder(tower_dim=8, ffn_dim=12, num_layers=1, num_heads=2, patch_size=2, max_image_size=8, merge_size=2)


def test_features_follow_their_tokens() -> None:
    batch_type = feature_batch(VISION, 16, FeatureShape(3, "bfloat16"))
    batch = batch_type.empty(2, 12)
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    first = StoredPiece(np.array([1, 7, 7, 2, 3]), None, features=FeaturesOfPiece(rows[:2], 7))
    plain = StoredPiece(np.array([1, 5, 2]), None)
    last = StoredPiece(np.array([7, 4, 2]), None, features=FeaturesOfPiece(rows[2:], 7))
    batch.fill_row(0, [first, plain, last])
    assert batch.feature_index[0].tolist() == [-1, 0, 1, -1, -1, -1, 2, -1, -1, -1, -1, -1]
    assert batch.features.shape == (2, 4, 3) and batch.features.dtype.name == "bfloat16"
    assert np.array_equal(batch.features[0, :3].astype(np.float32), rows) and not batch.features[1].any()


def test_room_is_that_of_the_tower() -> None:
    shape = FeatureShape(3, "float32")
    of_sound = feature_batch(ENCODER, 2, shape)
    assert of_sound.num_features() == 8 and of_sound.computed_type() is media_batch(ENCODER, 2)
    of_pictures = feature_batch(VISION, 16, shape)
    assert of_pictures.computed_type() is media_batch(VISION, 16)
    synthetic = of_pictures.synthetic(2, 6, 100, seed=0)
    assert (synthetic.feature_index[:, :4] == np.arange(4)).all() and synthetic.features.any()
