"""Spectrograms against a plain reference with the filters of mistral-common; Whisper's extractor is among the judges."""

from __future__ import annotations

import numpy as np
import pytest
from mistral_common.audio import mel_filter_bank

from moe_train.data.sound.log_mel import log_mel, mel_filters
from moe_train.data.sound.rules import SoundRules

SMALL = SoundRules(16000, 8, 160, 400, 32, 8, 24, 25)


@pytest.mark.parametrize("bands", [8, 80, 128])
def test_filters_equal_those_of_mistral_common(bands: int) -> None:
    expected = mel_filter_bank(201, bands, 0.0, 8000.0, 16000)
    assert np.abs(mel_filters(bands, 400, 16000) - expected).max() < 1e-12 * expected.max()


def reference(samples: np.ndarray, chunks: int) -> np.ndarray:
    """The spectrogram frame by frame, by the definition of the discrete Fourier transform."""
    padded = np.zeros(chunks * 32 * 160)
    padded[: len(samples)] = samples
    padded = np.concatenate([padded[200:0:-1], padded, padded[-2:-202:-1]])
    n = np.arange(400)
    hann = 0.5 * (1 - np.cos(2 * np.pi * n / 400))
    basis = np.exp(-2j * np.pi * np.outer(np.arange(201), n) / 400)
    frames = []
    for frame in range(chunks * 32):
        power = np.abs(basis @ (padded[frame * 160 : frame * 160 + 400] * hann)) ** 2
        frames.append(np.log10(np.maximum(power @ mel_filter_bank(201, 8, 0.0, 8000.0, 16000), 1e-10)))
    logs = np.array(frames)
    return (np.maximum(logs, logs.max() - 8) + 4) / 4


@pytest.mark.parametrize("length", [1, 399, 5120, 5121, 9000])
def test_spectrograms_of_whole_chunks(length: int) -> None:
    samples = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)
    chunks = -(-length // 5120)
    found = log_mel(samples, SMALL)
    assert found.shape == (chunks, 32, 8) and found.dtype == np.float32
    expected = reference(samples, chunks)
    assert np.abs(found.reshape(-1, 8) - expected).max() < 1e-6 * np.abs(expected).max()


def test_silence_has_the_least_power() -> None:
    assert np.array_equal(log_mel(np.zeros(10, np.float32), SMALL), np.full((1, 32, 8), -1.5, np.float32))
