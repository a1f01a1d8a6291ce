"""Transcriptions against mistral-common, whose own reading of files needs soundfile and is stubbed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.audio import Audio

from moe_train.data.chat.conversation_to_tokens import examples, rendered_prompt
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.sound.read import samples_of
from moe_train.data.tokenizers.mistral import Mistral
from tests.commands.audio_wrapper import AUDIO, tone, wav
from tests.data.hugging_face import small_tekken

ANSWER = {"role": "assistant", "content": "hello you"}


@pytest.fixture(scope="module", params=["v7", "v11", "v13"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    return Mistral(small_tekken(tmp_path_factory.mktemp("tokenizer"), request.param, vocab=300, audio=AUDIO))


def asked(language: str) -> dict[str, Any]:
    url = f"data:audio/wav;base64,{base64.b64encode(wav(tone(600, 0.1))).decode()}"
    return {"role": "user", "content": [{"type": "audio", "audio": url}], "transcribe": language}


@pytest.mark.parametrize("language", ["", "en", "zh"])
def test_transcriptions_equal_those_of_mistral_common(tokenizer: Mistral, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_base64(text: str) -> Audio:
        return Audio(samples_of(base64.b64decode(text.partition(",")[2]), 16000), 16000, "wav")

    monkeypatch.setattr(Audio, "_check_valid", lambda self: None)
    monkeypatch.setattr(Audio, "from_base64", staticmethod(of_base64))
    question = asked(language)
    (example,) = examples(Conversation([question, ANSWER], []), None, tokenizer)
    request = TranscriptionRequest(audio=question["content"][0]["audio"], language=language or None)
    prompt = tokenizer.finetuning.encode_transcription(request).tokens
    answer = [*tokenizer.encode("hello you"), tokenizer.eos_id]
    assert example.tokens == [*prompt, *answer]
    assert example.loss_mask == [False] * len(prompt) + [True] * len(answer) and len(example.media) == 1
    assert rendered_prompt([question], None, tokenizer).tokens == prompt


def test_a_transcription_stands_alone(tokenizer: Mistral, tmp_path: Path) -> None:
    for messages, reason in (
        ([{"role": "system", "content": "a"}, asked("en"), ANSWER], "other messages besides"),
        ([asked("en"), ANSWER, {"role": "user", "content": "More?"}, ANSWER], "other messages besides"),
        ([asked("xx"), ANSWER], "none of ISO 639-1"),
    ):
        with pytest.raises(Problem, match=reason):
            examples(Conversation(messages, []), None, tokenizer)
