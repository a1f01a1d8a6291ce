"""Sound of files and data URLs, and what is wrong with it."""

from __future__ import annotations

import base64
import io
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.records.problem import Problem
from moe_train.data.sound import read
from moe_train.data.sound.read import open_clip, samples_of
from tests.commands.audio_wrapper import tone, wav
from tests.data.sound.test_wav import riff


def test_files_and_data_urls_give_the_same_samples(tmp_path: Path) -> None:
    samples = tone(440, 0.1)
    (tmp_path / "a.wav").write_bytes(wav(samples))
    clip = open_clip(str(tmp_path / "a.wav"), 16000)
    url = f"data:audio/wav;base64,{base64.b64encode(clip.data).decode()}"
    assert np.array_equal(open_clip(url, 16000).samples, clip.samples)
    assert np.array_equal(clip.samples, samples / np.float32(32768))


def sound(values: Any, code: int = 1, bits: int = 16, channels: int = 1, rate: int = 16000) -> bytes:
    """A WAV file with any header."""
    block = channels * bits // 8
    layout = struct.pack("<HHIIHH", code, channels, rate, rate * block % 2**32, block, bits)
    return riff((b"fmt ", layout), (b"data", np.asarray(values).tobytes()))


ONE = tone(300, 0.1)
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty: 0 bytes"),
    "no frames": (wav(np.zeros(0)), "has no samples"),
    "0 Hz": (sound(ONE, rate=0), "has 0 samples a second"),
    "1 Hz": (sound(ONE, rate=1), "has 1 samples a second"),
    "1 MHz": (sound(ONE, rate=1_000_000), "has 1000000 samples a second"),
    "2 channels": (wav(ONE, channels=2), "has 2 channels"),
    "16 channels": (sound(ONE[:1600], channels=16), "has 16 channels"),
    "cut off": (wav(ONE)[:-2], "cannot be read as WAV: it is cut off"),
    "infinity": (sound(np.array([np.inf], "<f4"), 3, 32), "no finite numbers"),
    "NaN": (sound(np.array([0, np.nan, 0], "<f8"), 3, 64), "no finite numbers"),
    "a float64 beyond float32": (sound(np.array([1e300], "<f8"), 3, 64), "no finite numbers"),
    "loud beyond its power": (sound(np.array([1e30], "<f4"), 3, 32), "samples up to 1e\\+30"),
    "extensible and compressed": (sound(ONE, 0xFFFE), "16 bits in format 65534"),
    "12 bits": (sound(ONE, bits=12), "12 bits in format 1"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_heard(kind: str) -> None:
    data, reason = BAD[kind]
    with pytest.raises(Problem, match=reason) as caught:
        samples_of(data, 16000)
    assert "\n" not in str(caught.value)


def test_clips_have_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST_SECONDS", 1)
    with pytest.raises(Problem, match="takes 2 s, and at most 1 s"):
        samples_of(wav(tone(300, 2.0)), 16000)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_name_says_nothing_about_the_content(width: int, tmp_path: Path) -> None:
    values = (ONE.astype(np.int64) << 8 * width >> 16).astype("<i8")
    raw = (values + 128).astype(np.uint8) if width == 1 else values[:, None].view(np.uint8)[:, :width]
    (tmp_path / "a.flac").write_bytes(sound(raw, bits=8 * width))
    clip = open_clip(str(tmp_path / "a.flac"), 16000)
    assert np.abs(clip.samples - ONE / 32768).max() <= 2.0 ** (1 - 8 * min(width, 2))


def test_packages_are_named_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(Problem, match=r"no WAV file; others are read with soundfile, which is not installed.*moe-train\[audio\]"):
        samples_of(b"fLaC....", 16000)
    with pytest.raises(Problem, match=r"44100 samples a second, not 16000; it is resampled with soxr, which is not installed"):
        samples_of(wav(tone(300, 0.1), rate=44100), 16000)


def encoded(format_: str, rate: int = 16000, seconds: float = 2.0) -> bytes:
    """Noise in a format of libsndfile."""
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    soundfile.write(file, samples, rate, format=format_)
    return file.getvalue()


@pytest.mark.parametrize("format_", ["FLAC", "OGG", "MP3"])
def test_compressed_files_are_read_whole_or_not_at_all(format_: str, tmp_path: Path) -> None:
    data = encoded(format_)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(open_clip(str(tmp_path / "a.wav"), 16000).samples) == 32000
    for part in (0.01, 0.5, 0.9):
        with pytest.raises(Problem, match=r"cut off|cannot be decoded") as caught:
            samples_of(data[: int(len(data) * part)], 16000)
        assert "object at" not in str(caught.value)


def test_stated_lengths_are_not_believed() -> None:
    """A small file that states 2^36 samples would take 275 GB."""
    data = bytearray(encoded("FLAC"))
    stated = int.from_bytes(data[18:26], "big") >> 36 << 36
    data[18:26] = (stated | 2**36 - 1).to_bytes(8, "big")
    with pytest.raises(Problem, match=r"takes 4,294,967 s, and at most 3,600 s"):
        samples_of(bytes(data), 16000)
    data[18:26] = stated.to_bytes(8, "big")  # none, as encoders write into a pipe
    with pytest.raises(Problem, match="states no number of samples"):
        samples_of(bytes(data), 16000)
    data = bytearray(encoded("MP3"))
    tagged = b"ID3\4\0\0\0\0\1\0" + b"\0" * 128 + data
    assert len(samples_of(bytes(tagged), 16000)) == 32000
    second = data.index(data[:2], 4)  # frames begin alike, and the first one states the length
    with pytest.raises(Problem, match="states no number of samples"):
        samples_of(bytes(data[second:]), 16000)


def test_other_formats_are_named() -> None:
    with pytest.raises(Problem, match="has the format AIFF of libsndfile, and WAV, FLAC, OGG, MP3 are read"):
        samples_of(encoded("AIFF"), 16000)
    with pytest.raises(Problem, match="cannot be decoded: Format not recognised"):
        samples_of(b"no sound at all", 16000)


def test_other_rates_are_read_as_by_mistral_common() -> None:
    soundfile = pytest.importorskip("soundfile")
    soxr = pytest.importorskip("soxr")
    data = encoded("FLAC", 44100, 0.2)
    expected = soxr.resample(soundfile.read(io.BytesIO(data), dtype="float32")[0], 44100, 16000, quality="HQ")
    assert np.array_equal(samples_of(data, 16000), expected)


def test_damage_anywhere_is_a_problem_of_one_line() -> None:
    """Bytes of headers and content are changed, removed or cut off."""
    draw = random.Random(0)
    files = [wav(ONE), sound(ONE.astype("<f8"), 3, 64), *(encoded(format_, seconds=0.2) for format_ in ("FLAC", "OGG"))]
    for _ in range(300):
        data = bytearray(draw.choice(files))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(min(len(data), 200))
            data[place : place + draw.choice((1, 4))] = draw.choice((b"", b"\0", b"\xff\xff\xff\xff", b"\x7f"))
        try:
            assert np.isfinite(samples_of(bytes(data[: draw.choice((None, 100))]), 16000)).all()
        except Problem as problem:
            assert "\n" not in str(problem)
