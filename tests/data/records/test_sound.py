"""Sound in records: its spellings, its places in texts, and transcriptions."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import normalise, read
from moe_train.data.records.media import sound_of
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.records.recognise import recognise
from moe_train.data.records.sound import take_transcription

CHAT = config.ChatRecord(name="chat")
ANSWER = {"role": "assistant", "content": "yes"}
TEXT = {"type": "text", "text": "What?"}
CLIP = {"type": "audio", "audio": "a.wav"}


def conversation(content: Any, **columns: Any) -> Conversation:
    record = normalise({"messages": [{"role": "user", "content": content}, ANSWER], **columns}, CHAT)
    assert isinstance(record, Conversation)
    return record


SPELLINGS: dict[str, tuple[Any, str]] = {
    "audio": (CLIP, "a.wav"),
    "path": ({"type": "audio", "path": "a.wav"}, "a.wav"),
    "url": ({"type": "audio", "url": "a.wav"}, "a.wav"),
    "base64": ({"type": "audio", "base64": "aGk="}, "data:audio/wav;base64,aGk="),
    "OpenAI": ({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}}, "data:audio/mp3;base64,aGk="),
    "Mistral": ({"type": "input_audio", "input_audio": "aGk="}, "data:audio/wav;base64,aGk="),
    "Mistral's URL": ({"type": "input_audio", "input_audio": "data:audio/wav;base64,aGk="}, "data:audio/wav;base64,aGk="),
    "vLLM": ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "a.wav"),
    "audio_url": ({"type": "audio_url", "audio_url": "a.wav"}, "a.wav"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_parts_of_every_spelling(spelling: str) -> None:
    part, reference = SPELLINGS[spelling]
    assert conversation([part, TEXT]).messages[0]["content"] == [{"type": "audio", "audio": reference}, TEXT]


COLUMNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LLaMA-Factory": ("<audio>What?\n<audio> And?", {"audios": ["a.wav", "b.wav"]}),
    "datasets": ("<audio>\nWhat?<audio>And?", {"audios": [{"path": "a.wav", "bytes": None}, {"path": "b.wav"}]}),
    "JSON text": ("<audio>What?<audio>And?", {"audios": '["a.wav", "b.wav"]'}),
    "parts": ([{"type": "audio"}, TEXT, {"type": "audio"}, {"type": "text", "text": "And?"}], {"audios": ["a.wav", "b.wav"]}),
}


@pytest.mark.parametrize("trainer", COLUMNS)
def test_placeholders_get_the_clips_of_a_column(trainer: str) -> None:
    content, columns = COLUMNS[trainer]
    expected = [CLIP, TEXT, CLIP | {"audio": "b.wav"}, {"type": "text", "text": "And?"}]
    assert conversation(content, **columns).messages[0]["content"] == expected


def test_sound_of_prompts() -> None:
    section = config.CompletionRecord(name="completion", prompt="prompt", completion="completion")
    record = normalise({"prompt": "<audio>What?", "completion": "yes", "audio": "a.wav"}, section)
    assert isinstance(record, Conversation) and sound_of(record) == ["a.wav"]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too few": ("<audio><audio>What?", {"audios": ["a.wav"]}, "1 clips in its column, and 2 places"),
    "too many": ("<audio>What?", {"audios": ["a.wav", "b.wav"]}, "2 clips in its column, and 1 places"),
    "no placeholder": ("What?", {"audios": ["a.wav"]}, "and 0 places"),
    "no sound": ("<audio>\nWhat?", {}, "placeholder <audio>, and the record has no sound"),
    "a part without sound": ([TEXT, {"type": "audio"}], {}, "0 clips in its column, and 1 places"),
    "both columns": ("<audio>", {"audios": ["a.wav"], "audio": "a.wav"}, "both audios and audio"),
    "a number": ([{"type": "audio", "audio": 3}], {}, "should be sound, not 3"),
    "two clips in a part": ([{"type": "audio", "audio": "a", "url": "b"}], {}, "has both audio and url"),
    "decoded samples": ([{"type": "audio", "audio": {"array": [0.0], "sampling_rate": 16000}}], {}, "decoded samples"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_add_up_is_refused(kind: str) -> None:
    content, columns, reason = REFUSED[kind]
    with pytest.raises(Problem, match=reason):
        conversation(content, **columns)


def test_only_the_user_sounds() -> None:
    with pytest.raises(Problem, match="message 1 is assistant, and has sound"):
        normalise({"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": [CLIP]}]}, CHAT)


def test_transcriptions_are_recognized_by_their_columns() -> None:
    for column in ("text", "transcript", "transcription", "sentence"):
        fields = {"audio": {"bytes": None, "path": "a.wav"}, column: "hello", "language": "en", "speaker": 3}
        section = recognise(fields)
        assert isinstance(section, config.TranscriptionRecord) and section.text == column
        record, unread = read(fields, section)
        question = {"role": "user", "content": [CLIP], "transcribe": "en"}
        assert record == Conversation([question, {"role": "assistant", "content": "hello"}], []) and unread == ("speaker",)
    assert recognise({"audio": None, "text": "hello"}).name == "text"
    section = config.TranscriptionRecord(name="transcription")
    for fields, reason in (
        ({"audio": "a.wav", "text": "hi", "language": "English"}, "no code of two letters"),
        ({"audio": "a.wav", "text": None}, "text"),
        ({"audio": "", "text": "hi"}, "column 'audio' is null or empty"),
        ({"audio": 3, "text": "hi"}, "should be sound, not 3"),
    ):
        with pytest.raises(Problem, match=reason):
            read(fields, section)


def test_prompts_that_ask_for_a_transcription() -> None:
    fields = {"audio": "a.wav", "language": "fr", "id": 1}
    assert take_transcription(fields) == {"role": "user", "content": [CLIP], "transcribe": "fr"} and fields == {"id": 1}
    assert take_transcription({"audio": "a.wav", "messages": []}) is None and take_transcription({"prompt": "hi"}) is None
