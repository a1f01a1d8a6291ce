"""WAV files (RIFF) of integers or floats, with the values that libsndfile reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_INTEGERS = 1
_FLOATS = 3
_EXTENSIBLE = 0xFFFE
_UNKNOWN_SIZE = 0xFFFFFFFF
"""Size of the data in a file that was written into a pipe: they go to the end."""
_MOST_CHUNKS = 1000
"""Chunks of a file, a few of which come before the data in practice."""
_FLOAT_DTYPES: dict[int, np.dtype] = {32: np.dtype("<f4"), 64: np.dtype("<f8")}
_INTEGER_BITS = (8, 16, 24, 32)


class Samples(NamedTuple):
    """Decoded sound."""

    values: np.ndarray
    """(n, channels) float32, from -1 to 1 unless the file has larger floats."""
    sampling_rate: int
    """Samples a second."""


class _Format(NamedTuple):
    """How the samples of a file are written."""

    code: int
    channels: int
    sampling_rate: int
    bits: int


def is_wav(data: bytes) -> bool:
    """Return whether a file begins as a WAV file does."""
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def read_wav(data: bytes) -> Samples:
    """Decode a WAV file.

    Raises:
        ValueError: the file is damaged, or its samples are compressed.
    """
    layout: _Format | None = None
    for number, (name, content, size) in enumerate(_chunks(data)):
        if number == _MOST_CHUNKS:
            raise ValueError(f"it has no data among its first {_MOST_CHUNKS} chunks")
        if name == b"fmt ":
            layout = _format(content)
        elif name == b"data":
            if layout is None:
                raise ValueError("its data come before their format")
            if len(content) < size and size != _UNKNOWN_SIZE:
                raise ValueError(f"it is cut off: {len(content)} of {size} bytes of data")
            return Samples(_values(content, layout), layout.sampling_rate)
    raise ValueError("it has no data")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield the name of each chunk of a RIFF file, its content as far as it is there, and its stated size."""
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        yield name, data[place + 8 : place + 8 + size], size
        place += 8 + size + size % 2  # chunks begin at even bytes


def _format(content: bytes) -> _Format:
    """Read the chunk that says how samples are written."""
    if len(content) < 16:
        raise ValueError("its format is cut off")
    code, channels, sampling_rate, _, block, bits = struct.unpack_from("<HHIIHH", content)
    if code == _EXTENSIBLE and len(content) >= 26:
        (code,) = struct.unpack_from("<H", content, 24)
    supported = bits in _INTEGER_BITS if code == _INTEGERS else code == _FLOATS and bits in _FLOAT_DTYPES
    if not supported:
        raise ValueError(f"its samples have {bits} bits in format {code}; integers of 8 to 32 bits and floats are read")
    if channels < 1 or block != channels * bits // 8:
        raise ValueError(f"it states {channels} channels of {bits} bits in blocks of {block} bytes")
    return _Format(code, channels, sampling_rate, bits)


def _values(content: bytes, layout: _Format) -> np.ndarray:
    """Convert the bytes of samples to numbers."""
    width = layout.bits // 8
    content = content[: len(content) // (width * layout.channels) * width * layout.channels]
    values: np.ndarray
    if layout.code == _FLOATS:
        with np.errstate(over="ignore"):  # infinity, which is refused
            values = np.frombuffer(content, _FLOAT_DTYPES[layout.bits]).astype(np.float32)
    elif layout.bits == 8:  # unsigned, unlike all others
        values = (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128
    else:
        # Moved to the upper bytes of 32 bits, so that integers of any width are fractions of 2^31.
        wide = np.zeros((len(content) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
        values = (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return values.reshape(-1, layout.channels)
