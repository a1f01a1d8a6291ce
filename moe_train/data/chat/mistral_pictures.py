"""Pictures in conversations that mistral-common encodes: their tokens, without the pixels, which are computed when needed."""

from __future__ import annotations

import numpy as np
from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, ImageEncoding, SpecialImageIDs

from moe_train.data.pictures.read import RULE, open_picture
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.pictures import references_of
from moe_train.data.records.problem import Problem
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
        assert isinstance(content, ImageURLChunk)  # as `mistral` writes all pictures
        picture = open_picture(content.get_url())
        tokens = self._rules.tokens(self._rules.grid(picture.width, picture.height))
        return ImageEncoding(tokens, np.frombuffer(picture.data, np.uint8))


def picture_files(conversation: Conversation) -> list[str]:
    """Return the files of the pictures of a conversation, without those that are data URLs."""
    return [reference for reference in references_of(conversation) if not reference.startswith("data:")]


def check_pictures(conversation: Conversation, tokenizer: Mistral) -> None:
    """Raise Problem if a conversation has pictures that cannot be written with this tokenizer."""
    if not references_of(conversation):
        return
    if tokenizer.pictures is None:
        name = f"{tokenizer.files[0].name} (version {tokenizer.finetuning.version.value})"
        raise Problem(
            RULE, f"the record has pictures, and {name} states no sizes for them", "use the tokenizer of a model that sees"
        )
