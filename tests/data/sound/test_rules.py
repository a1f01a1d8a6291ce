"""Tokens of sound against the encoder of mistral-common."""

from __future__ import annotations

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.audio import AudioConfig, AudioEncoder, AudioSpectrogramConfig, SpecialAudioIDs

from moe_train.data.sound.rules import SoundRules

VOXTRAL = SoundRules(16000, 128, 160, 400, 3000, 8, 24, 25)
ENCODER = AudioEncoder(
    AudioConfig(16000, 12.5, AudioSpectrogramConfig(128, 160, 400), 30.0), SpecialAudioIDs(24, 25, None, None, None)
)


@pytest.mark.parametrize("samples", [1, 159, 160, 399, 16000, 479_999, 480_000, 480_001, 1_000_000])
def test_tokens_equal_those_of_mistral_common(samples: int) -> None:
    padded = ENCODER.pad(np.zeros(samples, np.float32), 16000)
    tokens = VOXTRAL.tokens(samples)
    assert tokens == ENCODER._encode_audio_tokens(len(padded))
    assert len(padded) == VOXTRAL.num_chunks(samples) * VOXTRAL.samples_per_chunk
    assert VOXTRAL.room(tokens) == VOXTRAL.num_chunks(samples)
    assert set(tokens) == set(VOXTRAL.control_ids)
    assert VOXTRAL.sizes_in([7, *tokens, 8, *tokens]) == [len(tokens)] * 2
