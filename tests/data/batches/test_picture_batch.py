"""Batches with pictures: where patches and features stand, and what refuses them."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.picture_batch import PictureBatch, picture_batch
from moe_train.data.pictures.patches import PatchedPicture, PicturesOfPiece
from moe_train.data.pictures.rules import PictureRules

ENCODER = config.VisionEncoder(tower_dim=8, ffn_dim=12, num_layers=1, num_heads=2, patch_size=2, max_image_size=8, merge_size=2)
TYPE = picture_batch(ENCODER, 16)


def picture(tokens: int, value: float) -> PatchedPicture:
    return PatchedPicture(np.full((4 * tokens, 12), value, np.float32), np.full((4 * tokens, 2), value, np.int32))


def test_features_follow_their_tokens() -> None:
    batch = TYPE.empty(2, 12)
    first = PicturesOfPiece((picture(1, 3.0), picture(2, 4.0)), 10)
    pieces = [
        StoredPiece(np.array([1, 10, 13, 10, 10, 13, 7]), None, pictures=first),
        StoredPiece(np.array([1, 8]), None),
        StoredPiece(np.array([1, 10, 13, 9]), None, pictures=PicturesOfPiece((picture(1, 5.0),), 10)),
    ]
    batch.fill_row(1, pieces)
    assert batch.tokens[1].tolist() == [1, 10, 13, 10, 10, 13, 1, 1, 10, 13, 0, 0]
    assert batch.feature_index[1].tolist() == [-1, 0, -1, 1, 2, -1, -1, -1, 3, -1, -1, -1]
    assert batch.picture_ids[1].tolist() == [1] * 4 + [2] * 8 + [3] * 4
    assert batch.patches[1, :, 0].tolist() == [3.0] * 4 + [4.0] * 8 + [5.0] * 4
    assert batch.segment_ids[1].tolist() == [1] * 6 + [2] + [3] * 3 + [0, 0]
    assert not batch.picture_ids[0].any() and (batch.feature_index[0] == -1).all()


def test_pictures_and_tokens_that_differ_in_number_are_a_bug() -> None:
    piece = StoredPiece(np.array([1, 10, 13, 7]), None, pictures=PicturesOfPiece((picture(2, 1.0),), 10))
    with pytest.raises(AssertionError, match="differ in number"):
        TYPE.empty(1, 12).fill_row(0, [piece])


def test_a_synthetic_batch_fills_the_room() -> None:
    batch = TYPE.synthetic(2, 12, 24, 0)
    assert isinstance(batch, PictureBatch) and batch.patches.shape == (2, 16, 12)
    assert batch.feature_index[0].tolist() == [0, 1, 2, 3] + [-1] * 8
    assert batch.picture_ids.all()


def test_sizes_of_another_model_are_refused() -> None:
    TYPE.check_rules(PictureRules(2, 2, 8, 10, 12, 13), "data.jsonl")
    with pytest.raises(ValueError, match=r"data.jsonl.*\(2, 1, 8\).*\(2, 2, 8\)"):
        TYPE.check_rules(PictureRules(2, 1, 8, 10, 12, 13), "data.jsonl")
