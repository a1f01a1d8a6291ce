"""Log-mel spectrograms (arXiv:2212.04356), as those of mistral-common's filters and of Whisper's feature extractor.

Computed in float64: silent bands differ by 1e-8 from loud ones, which in float32 are rounding errors of the transform.
"""

from __future__ import annotations

import functools

import numpy as np

from moe_train.data.sound.rules import SoundRules

_HIGHEST = 8000.0
"""Upper edge of the last band in Hz."""
_FLOOR = 1e-10
"""Least power of a band."""
_RANGE = 8.0
"""Decades below the loudest band of a clip; what is quieter counts as that."""
_LINEAR_UNTIL = 1000.0
_HERTZ_PER_MEL = 200 / 3
_MELS_PER_LOG = 27 / np.log(6.4)
"""Slaney's scale of mels: linear up to 1000 Hz, logarithmic above, with 27 mels for a factor of 6.4."""
_FRAMES_AT_ONCE = 4096


def log_mel(samples: np.ndarray, rules: SoundRules) -> np.ndarray:
    """Compute the log-mel spectrogram of a clip, padded with silence to whole chunks.

    Args:
        samples: (n,) at the model's sampling rate.
        rules: sizes.

    Returns:
        (chunks, frames, bands) float32.
    """
    num_chunks = rules.num_chunks(len(samples))
    padded = np.zeros(num_chunks * rules.samples_per_chunk)
    padded[: len(samples)] = samples
    # Frames are centred on their samples; at the ends they see the signal mirrored.
    padded = np.pad(padded, rules.window_size // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, rules.window_size)[:: rules.hop_length]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(rules.window_size) / rules.window_size)
    filters = mel_filters(rules.num_mel_bins, rules.window_size, rules.sampling_rate)
    num_frames = num_chunks * rules.frames_per_chunk  # without the last one, which is centred on the end
    bands = np.empty((num_frames, rules.num_mel_bins))
    for start in range(0, num_frames, _FRAMES_AT_ONCE):
        stop = min(start + _FRAMES_AT_ONCE, num_frames)
        spectrum = np.fft.rfft(windows[start:stop] * hann)
        bands[start:stop] = (spectrum.real**2 + spectrum.imag**2) @ filters
    logs = np.log10(np.maximum(bands, _FLOOR))
    logs = np.maximum(logs, logs.max() - _RANGE)
    scaled: np.ndarray = (logs / 4 + 1).astype(np.float32)
    return scaled.reshape(num_chunks, rules.frames_per_chunk, rules.num_mel_bins)


@functools.cache
def mel_filters(num_mel_bins: int, window_size: int, sampling_rate: int) -> np.ndarray:
    """Return the triangular filters (frequencies, bands) of equal area on Slaney's scale.

    Args:
        num_mel_bins: number of bands.
        window_size: samples of a window.
        sampling_rate: samples a second.
    """
    edges = _hertz(np.linspace(0, _mels(_HIGHEST), num_mel_bins + 2))
    frequencies = np.linspace(0, sampling_rate // 2, window_size // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))
    return filters


def _mels(hertz: float) -> float:
    """Convert a frequency above the linear part of the scale to mels."""
    return float(_LINEAR_UNTIL / _HERTZ_PER_MEL + np.log(hertz / _LINEAR_UNTIL) * _MELS_PER_LOG)


def _hertz(mels: np.ndarray) -> np.ndarray:
    """Convert mels to frequencies."""
    logarithmic = mels - _LINEAR_UNTIL / _HERTZ_PER_MEL
    return np.where(logarithmic < 0, mels * _HERTZ_PER_MEL, _LINEAR_UNTIL * np.exp(logarithmic / _MELS_PER_LOG))
