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
_LOUDEST = 2.0**31
"""Largest sample: integers of 32 bits that were written as floats. The power of larger ones overflows in float32."""
_FORMATS = ("FLAC", "OGG", "MP3")
"""Formats of libsndfile, besides WAV, in which a file that is cut off is noticed."""
_FRAME_BYTES = 2048
"""No frame of an MP3 file is longer."""
_UNKNOWN_FRAMES = 1 << 62
"""From here on, the number of samples that libsndfile returns for a file that states none."""
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
    if is_wav(data):
        try:
            decoded = read_wav(data)
        except ValueError as error:
            raise Problem(RULE, f"{name} cannot be read as WAV: {error}", "write it again as 16-bit PCM") from error
        _check_header(name, decoded.sampling_rate, decoded.values.shape[1], len(decoded.values))
    else:
        decoded = _decoded(data, name)
    values = decoded.values[:, 0]
    rate = decoded.sampling_rate
    if not len(values):
        raise Problem(RULE, f"{name} has no samples", _DROP)
    if not np.isfinite(values).all():
        raise Problem(RULE, f"{name} has samples that are no finite numbers", _DROP)
    loudest = float(np.abs(values).max())
    if loudest > _LOUDEST:
        raise Problem(RULE, f"{name} has samples up to {loudest:.3g}, and sound lies between -1 and 1", "scale its samples")
    return values if rate == sampling_rate else _resampled(values, rate, sampling_rate, name)


def _check_header(name: str, rate: int, channels: int, frames: int) -> None:
    """Check what a file states. Raises Problem for a rate, a number of channels or a length that is not read."""
    if not _SLOWEST <= rate <= _FASTEST:
        raise Problem(RULE, f"{name} has {rate} samples a second, and {_SLOWEST:,} to {_FASTEST:,} are read", "correct its header")
    if channels > 1:
        raise Problem(RULE, f"{name} has {channels} channels, and a model hears one", "mix it down: ffmpeg -i IN -ac 1 OUT")
    if frames > LONGEST_SECONDS * rate:
        message = f"{name} takes {frames / rate:,.0f} s, and at most {LONGEST_SECONDS:,} s are read"
        raise Problem(RULE, message, "cut it into several records")


class _Stream(io.BytesIO):
    """The content of a file for libsndfile, which may seek to places before its start in a damaged one."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, or stay where there is none."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _decoded(data: bytes, name: str) -> Samples:
    """Decode a file that is no WAV file, with libsndfile."""
    soundfile = _soundfile(name)
    try:
        with soundfile.SoundFile(_Stream(data)) as file:
            if file.format not in _FORMATS:
                message = f"{name} has the format {file.format} of libsndfile, and WAV, {', '.join(_FORMATS)} are read"
                raise Problem(RULE, message, "convert it: ffmpeg -i IN OUT.wav")
            if file.frames >= _UNKNOWN_FRAMES or (file.format == "MP3" and not _states_length(data)):
                message = f"{name} states no number of samples, which libsndfile then cannot know"
                raise Problem(RULE, message, "convert it: ffmpeg -i IN OUT.wav")
            # Before anything is decoded: a small file may state terabytes of silence.
            _check_header(name, file.samplerate, file.channels, file.frames)
            values = file.read(dtype="float32", always_2d=True)
            if len(values) < file.frames:
                raise Problem(RULE, f"{name} is cut off: {len(values)} of {file.frames} samples", _DROP)
            if file.format == "OGG" and not _ends_ogg(data):
                raise Problem(RULE, f"{name} is cut off: its last page is not marked as the end", _DROP)
            return Samples(values, file.samplerate)
    except soundfile.LibsndfileError as error:
        reason = " ".join(str(error.error_string).split())
        raise Problem(RULE, f"{name} cannot be decoded: {reason}", _DROP) from error


def _states_length(data: bytes) -> bool:
    """Return whether an MP3 file begins with a frame that states its length, which libsndfile guesses otherwise."""
    start = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        # Seven bits in each byte of a tag's size.
        start = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(data[6:10])))
    first_frame = data[start : start + _FRAME_BYTES]
    return any(word in first_frame for word in (b"Xing", b"Info", b"VBRI"))


def _ends_ogg(data: bytes) -> bool:
    """Return whether the last page of an Ogg file is marked as the end of its stream (RFC 3533, section 6)."""
    flags = data.rfind(b"OggS") + 5
    return flags < len(data) and bool(data[flags] & 4)


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
