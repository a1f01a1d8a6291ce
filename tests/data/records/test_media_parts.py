"""Parts that are pictures or sound, in the spellings of several APIs."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.records.media_parts import KINDS, PICTURES, SOUND, MediaKind, kind_of, read_media_part, reference_of
from moe_train.data.records.normal_form import MEDIA
from moe_train.data.records.problem import Problem

SPELLINGS: dict[str, tuple[MediaKind, dict[str, Any], str]] = {
    "image": (PICTURES, {"type": "image", "image": "a.png"}, "a.png"),
    "path": (PICTURES, {"type": "image", "path": "a.png"}, "a.png"),
    "url": (PICTURES, {"type": "image", "url": "a.png"}, "a.png"),
    "OpenAI": (PICTURES, {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "a.png"),
    "Mistral": (PICTURES, {"type": "image_url", "image_url": "a.png"}, "a.png"),
    "responses": (PICTURES, {"type": "input_image", "image_url": "a.png", "detail": "low"}, "a.png"),
    "Anthropic": (
        PICTURES,
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
        "data:image/png;base64,aGk=",
    ),
    "base64 of a picture": (PICTURES, {"type": "image", "base64": "aGk="}, "data:image;base64,aGk="),
    "audio": (SOUND, {"type": "audio", "audio": "a.wav"}, "a.wav"),
    "path of sound": (SOUND, {"type": "audio", "path": "a.wav"}, "a.wav"),
    "base64 of sound": (SOUND, {"type": "audio", "base64": "aGk="}, "data:audio/wav;base64,aGk="),
    "OpenAI's sound": (
        SOUND,
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}},
        "data:audio/mp3;base64,aGk=",
    ),
    "Mistral's sound": (SOUND, {"type": "input_audio", "input_audio": "aGk="}, "data:audio/wav;base64,aGk="),
    "Mistral's URL": (SOUND, {"type": "input_audio", "input_audio": "data:audio/wav;base64,aGk="}, "data:audio/wav;base64,aGk="),
    "vLLM": (SOUND, {"type": "audio_url", "audio_url": {"url": "a.wav"}}, "a.wav"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_parts_of_every_spelling(spelling: str) -> None:
    kind, part, reference = SPELLINGS[spelling]
    remaining = dict(part)
    assert kind_of(remaining.pop("type")) is kind
    assert read_media_part(remaining, kind, "part 0") == {"type": kind.part, kind.part: reference} and not remaining


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.part)
def test_parts_that_are_not_read(kind: MediaKind) -> None:
    assert read_media_part({}, kind, "part 0") == {"type": kind.part, kind.part: None}
    with pytest.raises(Problem, match=f"part 0 should be {kind.substance}, not 3"):
        read_media_part({kind.part: 3}, kind, "part 0")
    with pytest.raises(Problem, match=f"has both {kind.part} and url"):
        read_media_part({kind.part: "a", "url": "b"}, kind, "part 0")
    with pytest.raises(Problem, match="decoded samples"):
        reference_of({"array": [0.0], "sampling_rate": 16000}, kind, "column audio")
    assert kind_of("text") is None and kind_of(None) is None
    assert tuple(kind.part for kind in KINDS) == MEDIA
