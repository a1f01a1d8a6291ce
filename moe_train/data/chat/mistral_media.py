"""Pictures and sound in conversations that mistral-common encodes: their tokens, and files in the place of pixels and samples,
which are computed when needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mistral_common.protocol.instruct.chunk import AudioChunk, AudioURLChunk, ImageChunk, ImageURLChunk
from mistral_common.tokens.tokenizers.audio import Audio, AudioEncoder, AudioEncoding
from mistral_common.tokens.tokenizers.base import Tokenized
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, ImageEncoding, SpecialImageIDs
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.pictures.read import open_picture
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.records.media import references_of
from moe_train.data.records.media_parts import KINDS, PICTURES, SOUND
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem
from moe_train.data.sound.read import open_clip
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.mistral import Mistral


class PictureTokens(ImageEncoder):
    """mistral-common's encoder of pictures, which reads them as `data.pictures` does, and returns files in place of pixels."""

    def __init__(self, rules: PictureRules) -> None:
        sizes = ImageConfig(rules.patch_size, rules.max_image_size, rules.cell_size)
        super().__init__(sizes, SpecialImageIDs(rules.image_token, rules.break_token, rules.end_token))
        self._rules = rules

    def __call__(self, content: ImageChunk | ImageURLChunk) -> ImageEncoding:
        """Return the tokens of a picture, and the bytes of its file.

        Raises:
            Problem: the picture cannot be used.
        """
        assert isinstance(content, ImageURLChunk)  # as `media_chunk` writes all pictures
        picture = open_picture(content.get_url())
        tokens = self._rules.tokens(self._rules.grid(picture.width, picture.height))
        return ImageEncoding(tokens, np.frombuffer(picture.data, np.uint8))


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
        assert isinstance(reference, str)  # as `media_chunk` and `transcription_prompt` write all clips
        clip = open_clip(reference, self._rules.sampling_rate)
        return AudioEncoding(self._rules.tokens(len(clip.samples)), ClipFile(clip.data))


def read_files_with(encoder: InstructTokenizerBase, tokenizer: Mistral) -> None:
    """Let an encoder of mistral-common read pictures and sound as this package does.

    Args:
        encoder: a copy, which is changed.
        tokenizer: the tokenizer that it belongs to.
    """
    rules = tokenizer.media
    # An attribute of the copy shadows that of its class.
    if isinstance(rules, PictureRules):
        vars(encoder)["image_encoder"] = PictureTokens(rules)
    if isinstance(rules, SoundRules):
        assert encoder.audio_encoder is not None  # which states the rules
        vars(encoder)["audio_encoder"] = SoundTokens(encoder.audio_encoder, rules)


def media_chunk(part: dict[str, Any]) -> dict[str, Any]:
    """Return a picture or a clip in mistral-common's form, where both are URLs: `PictureTokens` and `SoundTokens` read them."""
    key = f"{part['type']}_url"
    return {"type": key, key: part[part["type"]]}


def media_of(encoded: Tokenized) -> tuple[bytes, ...]:
    """Return the content of the files of encoded pictures or clips; no tokenizer has rules for both."""
    data = [picture.tobytes() for picture in encoded.images]
    for audio in encoded.audios:
        assert isinstance(audio, ClipFile)  # as `SoundTokens` returns them
        data.append(audio.data)
    return tuple(data)


def media_files(messages: list[Message]) -> tuple[str, ...]:
    """Return the files of the pictures and the sound of messages, without those that are data URLs."""
    return tuple(reference for reference in references_of(messages) if not reference.startswith("data:"))


def check_media(conversation: Conversation, tokenizer: Mistral) -> None:
    """Raise Problem if a conversation has pictures or sound that cannot be written with this tokenizer, or not together."""
    present = [kind for kind in KINDS if references_of(conversation.messages, kind)]
    if not present:
        return
    if len(present) > 1:
        raise Problem(SOUND.rule, "the record has sound and pictures, which no model takes together", "drop the record")
    (kind,) = present
    rules = tokenizer.media
    if rules is None or isinstance(rules, PictureRules) != (kind is PICTURES):
        name = f"{tokenizer.files[0].name} (version {tokenizer.finetuning.version.value})"
        if kind is PICTURES:
            message = f"the record has pictures, and {name} states no sizes for them"
            raise Problem(kind.rule, message, "use the tokenizer of a model that sees")
        message = f"the record has sound, and {name} states no chunks for it, or those of a stream, or pictures too"
        raise Problem(kind.rule, message, "use the tekken.json of a model that hears, such as Voxtral Mini or Small (2507)")
