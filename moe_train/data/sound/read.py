"""Read the sound that records name: files and data URLs, checked, and never fetched from a network.

Sound is read as mistral-common reads it: with libsndfile, resampled with soxr, and refused if it has several channels. WAV files
need neither package.
"""

from __future__ import annotations

import functools
import io
from typing import Any, NamedTuple

import numpy as np

from moe_train.data.records.data_urls import data_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.sound.wav import Samples, is_wav, read_wav

RULE = "sound"
"""Rule that a record with unusable sound breaks."""
LONGEST_SECONDS = 3600
"""Longest clip in seconds; Voxtral takes up to 40 minutes."""
_SLOWEST = 4_000
_FASTEST = 768_000
"""Range of sampling rates, in Hz, in which files state one in earnest."""
_EXTRA = "pip install 'moe-train[audio]'"
_DROP = "replace it, or drop the record"


class Clip(NamedTuple):
    """Sound that has been checked."""

    data: bytes
    """The file as it is."""
    samples: np.ndarray
    """(n,) float32 at the model's sampling rate."""


# Cached, since a record is checked, tokenized and stored one after the other.
@functools.lru_cache(maxsize=4)
def open_clip(reference: str, sampling_rate: int) -> Clip:
    """Read and check sound.

    Args:
        reference: a data URL, or the path of a file (`records.media.located_path`).
        sampling_rate: the model's sampling rate.

    Raises:
        Problem: there is no such sound, or it cannot be used.
    """
    name = brief(reference)
    data = data_of(reference, name, RULE, "sound")
    return Clip(data, samples_of(data, sampling_rate, f"the sound {name}"))


def samples_of(data: bytes, sampling_rate: int, name: str = "the sound") -> np.ndarray:
    """Decode the content of a file to samples at the model's sampling rate.

    Args:
        data: the content.
        sampling_rate: the model's sampling rate.
        name: the file, for messages.

    Raises:
        Problem: it cannot be used.
    """
    if not data:
        raise Problem(RULE, f"{name} is empty: 0 bytes", _DROP)
    decoded = _decoded(data, name)
    rate = decoded.sampling_rate
    if not _SLOWEST <= rate <= _FASTEST:
        raise Problem(RULE, f"{name} has {rate} samples a second, and {_SLOWEST:,} to {_FASTEST:,} are read", "correct its header")
    channels = decoded.values.shape[1]
    if channels > 1:
        raise Problem(RULE, f"{name} has {channels} channels, and a model hears one", "mix it down: ffmpeg -i IN -ac 1 OUT")
    values = decoded.values[:, 0]
    if not len(values):
        raise Problem(RULE, f"{name} has no samples", _DROP)
    if len(values) > LONGEST_SECONDS * rate:
        raise Problem(
            RULE,
            f"{name} takes {len(values) / rate:,.0f} s, and at most {LONGEST_SECONDS:,} s are read",
            "cut it into several records",
        )
    if not np.isfinite(values).all():
        raise Problem(RULE, f"{name} has samples that are no finite numbers", _DROP)
    return values if rate == sampling_rate else _resampled(values, rate, sampling_rate, name)


def _decoded(data: bytes, name: str) -> Samples:
    """Decode a file; WAV files without a package."""
    if is_wav(data):
        try:
            return read_wav(data)
        except ValueError as error:
            raise Problem(RULE, f"{name} cannot be read as WAV: {error}", "write it again as 16-bit PCM") from error
    soundfile = _soundfile(name)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            values = file.read(dtype="float32", always_2d=True)
            if len(values) < file.frames:
                raise Problem(RULE, f"{name} is cut off: {len(values)} of {file.frames} samples", _DROP)
            return Samples(values, file.samplerate)
    except soundfile.LibsndfileError as error:
        reason = " ".join(str(error).split())
        raise Problem(RULE, f"{name} cannot be decoded: {reason}", _DROP) from error


def _soundfile(name: str) -> Any:
    """Import soundfile, which only files other than WAV need."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library of C is missing
        raise Problem(RULE, f"{name} is no WAV file; others are read with soundfile, which is not installed", _EXTRA) from error
    return soundfile


def _resampled(values: np.ndarray, rate: int, sampling_rate: int, name: str) -> np.ndarray:
    """Resample with soxr, of whose filters another package would give other samples than mistral-common has."""
    try:
        import soxr
    except ImportError as error:
        message = f"{name} has {rate} samples a second, not {sampling_rate}; it is resampled with soxr, which is not installed"
        raise Problem(RULE, message, f"{_EXTRA}, or resample it: ffmpeg -i IN -ar {sampling_rate} OUT") from error
    resampled: np.ndarray = soxr.resample(values, rate, sampling_rate, quality="HQ")
    if not len(resampled):
        raise Problem(RULE, f"{name} has {len(values)} samples, which are none at {sampling_rate} a second", _DROP)
    return resampled
