"""Conversations with sound against mistral-common, whose own reading of files needs soundfile and is stubbed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.audio import Audio

from moe_train.data.chat.conversation_to_tokens import examples, render_prompt, rendered_prompt
from moe_train.data.chat.mistral_sound import sound_files
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.sound.read import samples_of
from moe_train.data.tokenizers.mistral import Mistral
from tests.commands.audio_wrapper import AUDIO, tone, wav
from tests.data.hugging_face import small_tekken

TEXT = {"type": "text", "text": "What is this?"}
ANSWER = {"role": "assistant", "content": "A tone."}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture(scope="module", params=["v7", "v11", "v13"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    return Mistral(small_tekken(tmp_path_factory.mktemp("tokenizer"), request.param, vocab=300, audio=AUDIO))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A file of two chunks, and a data URL of one."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "a.wav").write_bytes(wav(tone(300, 0.4)))
    url = f"data:audio/wav;base64,{base64.b64encode(wav(tone(600, 0.1))).decode()}"
    return [{"type": "audio", "audio": str(folder / "a.wav")}, {"type": "audio", "audio": url}]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mistral-common read sound without soundfile."""

    def of_bytes(data: bytes) -> Audio:
        return Audio(samples_of(data, 16000), 16000, "wav")

    monkeypatch.setattr(Audio, "_check_valid", lambda self: None)
    monkeypatch.setattr(Audio, "from_file", staticmethod(lambda file: of_bytes(Path(file.removeprefix("file://")).read_bytes())))
    monkeypatch.setattr(Audio, "from_base64", staticmethod(lambda text: of_bytes(base64.b64decode(text.partition(",")[2]))))


def by_mistral_common(tokenizer: Mistral, messages: list[dict[str, Any]]) -> list[int]:
    converted = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [{"type": "audio_url", "audio_url": part["audio"]} if "audio" in part else part for part in content]
        converted.append({"role": message["role"], "content": content})
    request: Any = ChatCompletionRequest.model_validate({"messages": converted})
    return tokenizer.finetuning.encode_chat_completion(request).tokens


def orders(clips: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    first, second = clips
    return [[first, TEXT], [TEXT, first], [TEXT, first, TEXT, second], [first, second, TEXT], [second]]


@pytest.mark.parametrize("order", range(5))
def test_tokens_equal_those_of_mistral_common(tokenizer: Mistral, clips: list[dict[str, Any]], order: int, theirs: None) -> None:
    content = orders(clips)[order]
    messages = [{"role": "user", "content": content}, ANSWER, {"role": "user", "content": [clips[1], TEXT]}, ANSWER]
    (example,) = examples(Conversation(messages, []), None, tokenizer)
    assert example.tokens == by_mistral_common(tokenizer, messages)
    assert example.loss_mask is not None and tokenizer.sound is not None
    trained = {token for token, is_trained in zip(example.tokens, example.loss_mask, strict=True) if is_trained}
    assert trained and trained.isdisjoint(tokenizer.sound.control_ids)
    sizes = [len(tokenizer.sound.tokens(len(samples_of(data, 16000)))) for data in example.pictures]
    assert tokenizer.sound.sizes_in(example.tokens) == sizes
    assert len(example.picture_files) == sum(part is clips[0] for part in content)
    prompt = rendered_prompt(messages[:1], None, tokenizer)
    assert example.tokens[: len(prompt.tokens)] == prompt.tokens and prompt.pictures == example.pictures[:-1]
    with pytest.raises(Problem, match="not shown to the model here"):
        render_prompt(messages[:1], None, tokenizer)


@pytest.mark.parametrize("language", ["", "en", "zh"])
def test_transcriptions_equal_those_of_mistral_common(
    tokenizer: Mistral, clips: list[dict[str, Any]], language: str, theirs: None
) -> None:
    question = {"role": "user", "content": clips[1:], "transcribe": language}
    (example,) = examples(Conversation([question, {"role": "assistant", "content": "hello you"}], []), None, tokenizer)
    request = TranscriptionRequest(audio=clips[1]["audio"], language=language or None)
    prompt = tokenizer.finetuning.encode_transcription(request).tokens
    answer = [*tokenizer.encode("hello you"), tokenizer.eos_id]
    assert example.tokens == [*prompt, *answer]
    assert example.loss_mask == [False] * len(prompt) + [True] * len(answer) and len(example.pictures) == 1
    assert rendered_prompt([question], None, tokenizer).tokens == prompt


def test_what_has_no_place_for_sound_refuses_it(tokenizer: Mistral, clips: list[dict[str, Any]], tmp_path: Path) -> None:
    heard = Conversation([{"role": "user", "content": clips[:1]}, ANSWER], [])
    assert sound_files(heard) == [clips[0]["audio"]]
    transcription = {"role": "user", "content": clips[:1], "transcribe": "en"}
    picture = {"type": "image", "image": "data:image/png;base64,aGk="}
    deaf = Mistral(small_tekken(tmp_path, "v7", vocab=300))
    with pytest.raises(Problem, match="states no chunks for it"):
        examples(heard, None, deaf)
    for conversation, reason in (
        (heard._replace(tools=TOOLS), "sound and tools"),
        (Conversation([{"role": "user", "content": [*clips, picture]}, ANSWER], []), "pictures"),
        (Conversation([{"role": "system", "content": "a"}, transcription, ANSWER], []), "other messages besides"),
        (Conversation([transcription | {"transcribe": "xx"}, ANSWER], []), "none of ISO 639-1"),
    ):
        with pytest.raises(Problem, match=reason):
            examples(conversation, None, tokenizer)


def test_features_follow_from_the_samples_of_mistral_common(clips: list[dict[str, Any]]) -> None:
    pytest.importorskip("soundfile")
    for clip in clips:
        theirs = Audio.from_base64(clip["audio"]) if clip["audio"].startswith("data:") else Audio.from_file(clip["audio"])
        data = base64.b64decode(clip["audio"].partition(",")[2]) if clip["audio"].startswith("data:") else None
        data = data or Path(clip["audio"]).read_bytes()
        assert np.array_equal(samples_of(data, 16000), theirs.audio_array)
