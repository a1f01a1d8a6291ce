"""Rows with sound: chunks in the order of their tokens, and sizes that have to be the tower's."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.sound_batch import check_sizes, sound_batch
from moe_train.data.sound.clips import SoundOfPiece
from tests.commands.audio_wrapper import ENCODER
from tests.data.sound.test_log_mel import SMALL

BATCH = sound_batch(ENCODER, 4)


def test_tokens_of_packed_texts_have_the_features_of_their_own_sound() -> None:
    draw = np.random.default_rng(0)
    pieces = []
    chunks = []
    for count, before in ((2, 1), (0, 3), (1, 2)):
        tokens = np.array([*[7] * before, *([25] if count else []), *[24] * (4 * count), 8, 2])
        values = draw.normal(size=(count, 32, 8)).astype(np.float32)
        chunks.append(values)
        pieces.append(StoredPiece(tokens, np.ones(len(tokens), bool), pictures=SoundOfPiece(values, 24) if count else None))
    batch = BATCH.empty(2, 40)
    batch.fill_row(1, pieces)
    assert np.array_equal(batch.feature_index[1] >= 0, batch.tokens[1] == 24)
    assert batch.feature_index[1][batch.tokens[1] == 24].tolist() == list(range(12))
    assert batch.chunk_ids.tolist() == [[0] * 4, [1, 2, 3, 0]]
    assert np.array_equal(batch.frames[1, :3], np.concatenate(chunks)) and not batch.frames[0].any()


def test_synthetic_batches_fill_the_room() -> None:
    batch = BATCH.synthetic(2, 40, 100, 0)
    assert (batch.feature_index >= 0).sum() == 2 * 16 and batch.chunk_ids.all() and batch.frames.std() > 0.5
    assert not batch.loss_mask[:, :15].any() and batch.loss_mask[:, 15:].all()


def test_sizes_of_tokenizer_and_tower() -> None:
    check_sizes(ENCODER, SMALL, "set")
    with pytest.raises(ValueError, match=r"set: its tokenizer has sound of .* \(80, 32, 8\), but the audio tower has \(8, 32, 8\)"):
        BATCH.check_rules(SMALL._replace(num_mel_bins=80), "set")
    with pytest.raises(ValueError, match="frames of a token None"):
        check_sizes(ENCODER, None, "set")
