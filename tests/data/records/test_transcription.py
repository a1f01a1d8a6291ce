"""Records and prompts of transcriptions."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.data.records.conversation import read
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.records.recognise import recognise
from moe_train.data.records.transcription import take_transcription

CLIP = {"type": "audio", "audio": "a.wav"}


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
