"""Sound of files and data URLs, and what is wrong with it."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.records.problem import Problem
from moe_train.data.sound import read
from moe_train.data.sound.read import open_clip, samples_of
from tests.commands.audio_wrapper import tone, wav


def test_files_and_data_urls_give_the_same_samples(tmp_path: Path) -> None:
    samples = tone(440, 0.1)
    (tmp_path / "a.wav").write_bytes(wav(samples))
    clip = open_clip(str(tmp_path / "a.wav"), 16000)
    url = f"data:audio/wav;base64,{base64.b64encode(clip.data).decode()}"
    assert np.array_equal(open_clip(url, 16000).samples, clip.samples)
    assert np.array_equal(clip.samples, samples / np.float32(32768))


def test_what_cannot_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = np.array([np.inf], np.float32)
    header = wav(np.zeros(2, "<i2"))[:-4]
    cases = {
        b"": "is empty",
        wav(tone(300, 0.1), channels=2): "has 2 channels",
        wav(np.zeros(0)): "has no samples",
        wav(tone(300, 0.1), rate=1): "1 samples a second",
        wav(tone(300, 0.1))[:-2]: "cannot be read as WAV: it is cut off",
        header.replace(b"\x01\0\x01\0", b"\x03\0\x01\0").replace(b"\x02\0\x10\0", b"\x04\0\x20\0") + infinite.tobytes(): "finite",
    }
    for data, reason in cases.items():
        with pytest.raises(Problem, match=reason):
            samples_of(data, 16000)
    monkeypatch.setattr(read, "LONGEST_SECONDS", 1)
    with pytest.raises(Problem, match="takes 2 s, and at most 1 s"):
        samples_of(wav(tone(300, 2.0)), 16000)


def test_packages_are_named_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(Problem, match=r"no WAV file; others are read with soundfile, which is not installed.*moe-train\[audio\]"):
        samples_of(b"fLaC....", 16000)
    with pytest.raises(Problem, match=r"44100 samples a second, not 16000; it is resampled with soxr, which is not installed"):
        samples_of(wav(tone(300, 0.1), rate=44100), 16000)


def test_flac_and_other_rates_are_read_as_by_mistral_common() -> None:
    soundfile = pytest.importorskip("soundfile")
    soxr = pytest.importorskip("soxr")
    import io

    file = io.BytesIO()
    samples = tone(440, 0.2) / np.float32(32768)
    soundfile.write(file, samples, 44100, format="FLAC")
    expected = soxr.resample(samples, 44100, 16000, quality="HQ")
    assert np.array_equal(samples_of(file.getvalue(), 16000), expected)
    with pytest.raises(Problem, match="cannot be decoded"):
        samples_of(b"no sound at all", 16000)
    with pytest.raises(Problem, match=r"cut off|cannot be decoded"):
        samples_of(file.getvalue()[:-3000], 16000)
