"""Sound in conversations that mistral-common encodes: its tokens, without the samples, which are read when needed."""

from __future__ import annotations

from mistral_common.protocol.instruct.chunk import AudioChunk, AudioURLChunk
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.audio import Audio, AudioEncoder, AudioEncoding
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.chat.example import Example, RenderedPrompt, uses_tools
from moe_train.data.records.media import sound_of
from moe_train.data.records.normal_form import TRANSCRIBE, Conversation
from moe_train.data.records.pictures import references_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.sound.read import RULE, open_clip
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.mistral import Mistral


class ClipFile(Audio):
    """A clip as the bytes of its file, in the place of mistral-common's samples.

    Args:
        data: content of the file.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data


class SoundTokens(AudioEncoder):
    """mistral-common's encoder of sound, which reads it as `data.sound` does, and returns files in place of samples.

    Args:
        encoder: mistral-common's own.
        rules: how sound becomes tokens.
    """

    def __init__(self, encoder: AudioEncoder, rules: SoundRules) -> None:
        super().__init__(encoder.audio_config, encoder.special_ids)
        self._rules = rules

    def __call__(self, content: AudioChunk | AudioURLChunk) -> AudioEncoding:
        """Return the tokens of a clip, and its file.

        Raises:
            Problem: the sound cannot be used.
        """
        reference = content.url if isinstance(content, AudioURLChunk) else content.input_audio
        assert isinstance(reference, str)  # as `mistral` and `_transcription` write all clips
        clip = open_clip(reference, self._rules.sampling_rate)
        return AudioEncoding(self._rules.tokens(len(clip.samples)), ClipFile(clip.data))


def files_of(audios: list[Audio]) -> tuple[bytes, ...]:
    """Return the content of the files of encoded clips."""
    data = []
    for audio in audios:
        assert isinstance(audio, ClipFile)  # as `SoundTokens` returns them
        data.append(audio.data)
    return tuple(data)


def sound_files(conversation: Conversation) -> list[str]:
    """Return the files of the sound of a conversation, without what are data URLs."""
    return [reference for reference in sound_of(conversation) if not reference.startswith("data:")]


def check_sound(conversation: Conversation, tokenizer: Mistral) -> None:
    """Raise Problem if a conversation has sound that cannot be written with this tokenizer, or not with what else it has."""
    if not sound_of(conversation):
        return
    name = f"{tokenizer.files[0].name} (version {tokenizer.finetuning.version.value})"
    if tokenizer.sound is None:
        message = f"the record has sound, and {name} states no chunks for it, or those of a stream, or pictures too"
        raise Problem(RULE, message, "use the tekken.json of a model that hears, such as Voxtral Mini or Small (2507)")
    if uses_tools(conversation):
        raise Problem(RULE, "the record has sound and tools, which are not trained on together", "drop the record")
    if references_of(conversation):
        raise Problem(RULE, "the record has sound and pictures, which no model takes together", "drop the record")
    requests = [message for message in conversation.messages if TRANSCRIBE in message]
    if requests and len(conversation.messages) > 1 + (conversation.messages[-1]["role"] == "assistant"):
        message = "the record asks for a transcription, and has other messages besides"
        raise Problem(RULE, message, "leave them out: a transcription is a clip and its text")


def is_transcription(conversation: Conversation) -> bool:
    """Return whether a conversation is a request for a transcription, with or without the transcript."""
    return any(TRANSCRIBE in message for message in conversation.messages)


def transcription_prompt(conversation: Conversation, encoder: InstructTokenizerBase) -> RenderedPrompt:
    """Return the prompt of a request for a transcription, as mistral-common writes it."""
    (reference,) = sound_of(conversation)
    language = conversation.messages[0][TRANSCRIBE] or None
    try:
        request = TranscriptionRequest(audio=reference, language=language)
    except ValueError as error:
        raise Problem(RULE, f"language {brief(language)} is none of ISO 639-1", "correct it, or leave it out") from error
    encoded = encoder.encode_transcription(request)
    return RenderedPrompt(encoded.tokens, files_of(encoded.audios))


def transcription_example(conversation: Conversation, encoder: InstructTokenizerBase, tokenizer: Mistral) -> Example:
    """Return the example of a transcription: the transcript and EOS are trained on."""
    prompt = transcription_prompt(conversation, encoder)
    answer = conversation.messages[-1]
    content = answer["content"]
    if not isinstance(content, str):
        raise Problem(RULE, "the transcript is not a text", "write a text")
    ids = [*tokenizer.encode(content), tokenizer.eos_id]
    trained = answer.get("weight", 1) == 1
    mask = [*[False] * len(prompt.tokens), *[trained] * len(ids)]
    return Example([*prompt.tokens, *ids], mask, pictures=prompt.pictures, picture_files=tuple(sound_files(conversation)))
