"""Requests for the transcription of a clip, as mistral-common writes them."""

from __future__ import annotations

from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.chat.example import Example, RenderedPrompt
from moe_train.data.chat.mistral_media import media_files, media_of
from moe_train.data.records.media import references_of
from moe_train.data.records.media_parts import SOUND
from moe_train.data.records.normal_form import TRANSCRIBE, Conversation
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.mistral import Mistral


def is_transcription(conversation: Conversation) -> bool:
    """Return whether a conversation is a request for a transcription, with or without the transcript.

    Raises:
        Problem: it has other messages besides.
    """
    messages = conversation.messages
    if not any(TRANSCRIBE in message for message in messages):
        return False
    if len(messages) > 1 + (messages[-1]["role"] == "assistant"):
        error_text = "the record asks for a transcription, and has other messages besides"
        raise Problem(SOUND.rule, error_text, "leave them out: a transcription is a clip and its text")
    return True


def transcription_prompt(conversation: Conversation, encoder: InstructTokenizerBase) -> RenderedPrompt:
    """Return the prompt of a request for a transcription, as mistral-common writes it."""
    (reference,) = references_of(conversation.messages)
    language = conversation.messages[0][TRANSCRIBE] or None
    try:
        request = TranscriptionRequest(audio=reference, language=language)
    except ValueError as error:
        raise Problem(SOUND.rule, f"language {brief(language)} is none of ISO 639-1", "correct it, or leave it out") from error
    encoded = encoder.encode_transcription(request)
    return RenderedPrompt(encoded.tokens, media_of(encoded))


def transcription_example(conversation: Conversation, encoder: InstructTokenizerBase, tokenizer: Mistral) -> Example:
    """Return the example of a transcription: the transcript and EOS are trained on."""
    prompt = transcription_prompt(conversation, encoder)
    answer = conversation.messages[-1]
    content = answer["content"]
    if not isinstance(content, str):
        raise Problem(SOUND.rule, "the transcript is not a text", "write a text")
    ids = [*tokenizer.encode(content), tokenizer.eos_id]
    trained = answer.get("weight", 1) == 1
    mask = [*[False] * len(prompt.tokens), *[trained] * len(ids)]
    return Example([*prompt.tokens, *ids], mask, media=prompt.media, media_files=media_files(conversation.messages))
