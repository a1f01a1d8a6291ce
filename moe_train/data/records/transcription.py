"""Transcriptions: a clip of sound, its language and its text. The user's message that asks for one has the language, or "", under
`transcribe`.
"""

from __future__ import annotations

import re
from typing import Any

from moe_train import config
from moe_train.data.records.media_parts import SOUND, reference_of
from moe_train.data.records.normal_form import TRANSCRIBE, Conversation, Message
from moe_train.data.records.problem import NoColumn, Problem, brief, text_field
from moe_train.data.records.unread import is_empty

_LANGUAGE = re.compile(r"[a-z]{2}")
"""A language as mistral-common takes it: ISO 639-1."""


def transcription_message(reference: str, language: Any) -> Message:
    """Return the message of a user who asks for the transcription of a clip.

    Args:
        reference: the clip.
        language: its language (ISO 639-1); None if it is not stated.

    Raises:
        Problem: that is no language.
    """
    if is_empty(language):
        language = ""
    elif not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        message = f"language is {brief(language)}, which is no code of two letters"
        raise Problem(SOUND.rule, message, "write one of ISO 639-1, such as en")
    return {"role": "user", "content": [{"type": SOUND.part, SOUND.part: reference}], TRANSCRIBE: language}


def read_transcription(remaining: dict[str, Any], record: config.TranscriptionRecord) -> Conversation:
    """Read a clip and its transcript; what is read is taken out of `remaining`."""
    if is_empty(remaining.get(record.audio)):
        raise NoColumn(record.audio, list(remaining))
    reference = reference_of(remaining.pop(record.audio), SOUND, f"column {record.audio}")
    text = text_field(remaining, record.text)
    remaining.pop(record.text)
    question = transcription_message(reference, remaining.pop(record.language, None))
    return Conversation([question, {"role": "assistant", "content": text}], [])


def take_transcription(remaining: dict[str, Any]) -> Message | None:
    """Take a request for a transcription out of a prompt's columns: `audio`, and `language` if it is stated; None without one."""
    if any(name in remaining for name in ("messages", "prompt", "question")) or is_empty(remaining.get("audio")):
        return None
    reference = reference_of(remaining.pop("audio"), SOUND, "column audio")
    return transcription_message(reference, remaining.pop("language", None))
