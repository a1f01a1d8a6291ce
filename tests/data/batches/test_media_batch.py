"""Batches with pictures or sound: where patches, chunks and features stand, and sizes that have to be the tower's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.media_batch import MediaBatch, check_sizes, media_batch
from moe_train.data.media import MediaOfPiece
from moe_train.data.pictures.rules import PictureRules
from tests.commands.audio_wrapper import ENCODER as AUDIO
from tests.data.sound.test_log_mel import SMALL

VISION = config.VisionEncoder(tower_dim=8, ffn_dim=12, num_layers=1, num_heads=2, patch_size=2, max_image_size=8, merge_size=2)
SEEN = media_batch(VISION, 16)
HEARD = media_batch(AUDIO, 4)
RULES = PictureRules(2, 2, 8, 10, 12, 13)


def pictures(*tokens: int, first: int = 3) -> MediaOfPiece:
    """Pictures of so many tokens, each filled with a value of its own."""
    sizes = [4 * count for count in tokens]
    values = np.repeat(np.arange(first, first + len(tokens)), sizes)
    units = np.broadcast_to(values[:, None], (len(values), 12)).astype(np.float32)
    places = np.broadcast_to(values[:, None], (len(values), 2)).astype(np.int32)
    return MediaOfPiece(units, places, np.repeat(np.arange(1, len(tokens) + 1), sizes), 10)


def sound(draw: np.random.Generator, chunks: int) -> MediaOfPiece:
    units = draw.normal(size=(chunks, 32, 8)).astype(np.float32)
    return MediaOfPiece(units, np.zeros((chunks, 2), np.int32), np.arange(1, chunks + 1), 24)


def test_features_follow_the_tokens_of_pictures() -> None:
    batch = SEEN.empty(2, 12)
    pieces = [
        StoredPiece(np.array([1, 10, 13, 10, 10, 13, 7]), None, media=pictures(1, 2)),
        StoredPiece(np.array([1, 8]), None),
        StoredPiece(np.array([1, 10, 13, 9]), None, media=pictures(1, first=5)),
    ]
    batch.fill_row(1, pieces)
    assert batch.tokens[1].tolist() == [1, 10, 13, 10, 10, 13, 1, 1, 10, 13, 0, 0]
    assert batch.feature_index[1].tolist() == [-1, 0, -1, 1, 2, -1, -1, -1, 3, -1, -1, -1]
    assert batch.ids[1].tolist() == [1] * 4 + [2] * 8 + [3] * 4
    assert batch.units[1, :, 0].tolist() == [3.0] * 4 + [4.0] * 8 + [5.0] * 4
    assert np.array_equal(batch.places[1, :, 1], batch.units[1, :, 0])
    assert batch.segment_ids[1].tolist() == [1] * 6 + [2] + [3] * 3 + [0, 0]
    assert not batch.ids[0].any() and (batch.feature_index[0] == -1).all()


def test_features_follow_the_tokens_of_sound() -> None:
    draw = np.random.default_rng(0)
    pieces = []
    for count, before in ((2, 1), (0, 3), (1, 2)):
        tokens = np.array([*[7] * before, *([25] if count else []), *[24] * (4 * count), 8, 2])
        pieces.append(StoredPiece(tokens, np.ones(len(tokens), bool), media=sound(draw, count) if count else None))
    batch = HEARD.empty(2, 40)
    batch.fill_row(1, pieces)
    assert np.array_equal(batch.feature_index[1] >= 0, batch.tokens[1] == 24)
    assert batch.feature_index[1][batch.tokens[1] == 24].tolist() == list(range(12))
    assert batch.ids.tolist() == [[0] * 4, [1, 2, 3, 0]]
    chunks = [piece.media.units for piece in pieces if piece.media is not None]
    assert np.array_equal(batch.units[1, :3], np.concatenate(chunks)) and not batch.units[0].any()


def test_pictures_and_tokens_that_differ_in_number_are_a_bug() -> None:
    piece = StoredPiece(np.array([1, 10, 13, 7]), None, media=pictures(2))
    with pytest.raises(AssertionError, match="differ in number"):
        SEEN.empty(1, 12).fill_row(0, [piece])


def test_synthetic_batches_fill_the_room() -> None:
    seen = SEEN.synthetic(2, 12, 24, 0)
    assert isinstance(seen, MediaBatch) and seen.units.shape == (2, 16, 12) and (seen.ids == 1).all()
    assert seen.feature_index[0].tolist() == [0, 1, 2, 3] + [-1] * 8
    heard = HEARD.synthetic(2, 40, 100, 0)
    assert (heard.feature_index >= 0).sum() == 2 * 16 and heard.ids.tolist() == [[1, 2, 3, 4]] * 2 and heard.units.std() > 0.5
    assert not heard.loss_mask[:, :15].any() and heard.loss_mask[:, 15:].all()


def test_sizes_of_tokenizer_and_tower() -> None:
    check_sizes(VISION, RULES, "set")
    check_sizes(AUDIO, SMALL, "set")
    with pytest.raises(ValueError, match=r"set: its tokenizer has pictures of .*merged side 1.*the model has .*merged side 2"):
        check_sizes(VISION, replace(RULES, cell_size=1), "set")
    with pytest.raises(ValueError, match=r"its tokenizer has sound of frequency bands 80, .* has frequency bands 8, frames"):
        check_sizes(AUDIO, replace(SMALL, num_mel_bins=80), "set")
    for encoder, rules, media in ((AUDIO, None, "sound"), (AUDIO, RULES, "sound"), (VISION, SMALL, "pictures")):
        with pytest.raises(ValueError, match=f"set: its tokenizer states no sizes for {media}"):
            check_sizes(encoder, rules, "set")
