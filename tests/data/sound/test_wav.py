"""WAV files of every width, written by Python's own library or by hand."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest

from moe_train.data.sound.wav import is_wav, read_wav


def written(samples: np.ndarray, width: int, channels: int = 1, rate: int = 8000) -> bytes:
    """A file by Python's own library, of integers of `width` bytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((channels, width, rate, 0, "NONE", "NONE"))
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    content = b"WAVE" + b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def fmt(code: int, bits: int, channels: int = 1, extra: bytes = b"") -> bytes:
    block = channels * bits // 8
    return struct.pack("<HHIIHH", code, channels, 8000, 8000 * block, block, bits) + extra


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_are_fractions_of_their_range(width: int) -> None:
    values = np.array([-1.0, -0.5, 0.0, 0.25, 0.75])
    integers = (values * 2.0 ** (8 * width - 1)).astype("<i8")
    raw = (integers + 128).astype(np.uint8) if width == 1 else integers[:, None].view(np.uint8)[:, :width]
    decoded = read_wav(written(raw, width, rate=11025))
    assert decoded.sampling_rate == 11025
    assert np.array_equal(decoded.values[:, 0], values.astype(np.float32)) and decoded.values.dtype == np.float32


def test_floats_and_the_extensible_header() -> None:
    values = np.array([0.5, -1.5, 1e-9], np.float32)
    for bits in (32, 64):
        data = values.astype(f"<f{bits // 8}").tobytes()
        assert np.array_equal(read_wav(riff((b"fmt ", fmt(3, bits)), (b"data", data))).values[:, 0], values)
    extra = struct.pack("<HHI", 22, 16, 4) + struct.pack("<H", 1) + b"\0" * 14
    data = np.array([-32768, 16384], "<i2").tobytes()
    decoded = read_wav(riff((b"LIST", b"abc"), (b"fmt ", fmt(0xFFFE, 16, extra=extra)), (b"data", data)))
    assert decoded.values[:, 0].tolist() == [-1.0, 0.5]


def test_channels_stay_apart_and_pipes_state_no_size() -> None:
    samples = np.arange(6, dtype="<i2")
    data = written(samples, 2, channels=2)
    assert is_wav(data) and read_wav(data).values.shape == (3, 2)
    assert read_wav(data).values[:, 1].tolist() == [x / 32768 for x in (1, 3, 5)]
    piped = data.replace(b"data" + struct.pack("<I", 12), b"data" + b"\xff" * 4)
    assert np.array_equal(read_wav(piped).values, read_wav(data).values)


GOOD = riff((b"fmt ", fmt(1, 16)), (b"data", b"\0\0" * 8))
DAMAGED = {
    "cut off": (GOOD[:-4], "12 of 16 bytes"),
    "no data": (riff((b"fmt ", fmt(1, 16))), "no data"),
    "data first": (riff((b"data", b"\0\0")), "before their format"),
    "compressed": (riff((b"fmt ", fmt(2, 4)), (b"data", b"\0")), "4 bits in format 2"),
    "zeros": (GOOD[:12] + b"\0" * 100_000, "no data among its first 1000 chunks"),
    "a huge chunk": (riff((b"LIST", b"abc")).replace(b"\3\0\0\0abc", b"\xfe\xff\xff\xffabc") + GOOD[12:], "no data"),
    "huge data": (GOOD.replace(b"data\x10\0\0\0", b"data\xf0\xff\xff\xff"), "16 of 4294967280 bytes"),
    "half a format": (riff((b"fmt ", b"\0" * 8)), "format is cut off"),
    "no channels": (riff((b"fmt ", fmt(1, 16, channels=0)), (b"data", b"\0")), "states 0 channels"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(kind: str) -> None:
    data, reason = DAMAGED[kind]
    with pytest.raises(ValueError, match=reason):
        read_wav(data)
