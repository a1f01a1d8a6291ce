"""Pictures in conversations that a chat template writes: its [IMG] becomes the tokens that mistral-common gives a picture.

The template decides where a picture stands, as in transformers, whose processor does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_train.data.chat.example import OTHER_TEMPLATE, Example, by_turn
from moe_train.data.pictures.read import open_picture
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.records.media import has_media, references_of
from moe_train.data.records.media_parts import PICTURES, SOUND
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace


def check_pictures(conversation: Conversation, tokenizer: HuggingFace) -> None:
    """Raise Problem if a conversation has pictures or sound that cannot be written with a chat template."""
    messages = conversation.messages
    name = tokenizer.files[0].name
    if references_of(messages, SOUND):
        message = f"the record has sound, and {name} does not say how it is written"
        raise Problem(SOUND.rule, message, "name the model's tekken.json: data.tokenizer: {name: mistral, path: …}")
    if not references_of(messages, PICTURES):
        return
    remedy = "add it, or name the model's tekken.json: data.tokenizer: {name: mistral, path: …}"
    if tokenizer.media is None:
        raise Problem(PICTURES.rule, f"the record has pictures, and {name} does not say how: {tokenizer.media_fault}", remedy)
    if by_turn(conversation):
        message = f"the record has pictures together with tools or reasoning, which are not read with {name}"
        raise Problem(PICTURES.rule, message, "name the model's tekken.json: data.tokenizer: {name: mistral, path: …}")


def without_files(conversation: Conversation) -> Conversation:
    """Return a conversation whose pictures are parts without a file, as templates read them."""
    messages = [_without_files(message) for message in conversation.messages]
    return conversation._replace(messages=messages)


def _without_files(message: Message) -> Message:
    if not has_media(message):
        return message
    parts = [{"type": PICTURES.part} if part["type"] == PICTURES.part else part for part in message["content"]]
    return message | {"content": parts}


class Pictures(NamedTuple):
    """Tokens with the pictures that they stand for."""

    tokens: list[int]
    loss_mask: list[bool]
    """Whether each token is trained on; those of pictures are not."""
    media: tuple[bytes, ...]
    """Content of the files, in the order of the tokens."""


def with_pictures(tokens: Sequence[int], loss_mask: Sequence[bool], messages: Sequence[Message], rules: PictureRules) -> Pictures:
    """Replace each [IMG] that a template has written by the tokens of its picture.

    Raises:
        Problem: a picture cannot be used, or the template has not written one [IMG] for each.
    """
    references = references_of(messages, PICTURES)
    count = list(tokens).count(rules.image_token)
    if count != len(references):
        message = f"the chat template writes {count} placeholders for the {len(references)} pictures of the record"
        raise Problem(PICTURES.rule, message, f"name a template that writes one for each {OTHER_TEMPLATE}")
    pictures = iter([open_picture(reference) for reference in references])
    expanded: list[int] = []
    mask: list[bool] = []
    contents: list[bytes] = []
    for token, is_trained_on in zip(tokens, loss_mask, strict=True):
        if token != rules.image_token:
            expanded.append(token)
            mask.append(is_trained_on)
            continue
        picture = next(pictures)
        ids = rules.tokens(rules.grid(picture.width, picture.height))
        expanded += ids
        mask += [False] * len(ids)
        contents.append(picture.data)
    return Pictures(expanded, mask, tuple(contents))


def example_with_pictures(example: Example, conversation: Conversation, rules: PictureRules) -> Example:
    """Return the example of a conversation, with the tokens of its pictures; raises Problem as `with_pictures` does."""
    mask = [True] * len(example.tokens) if example.loss_mask is None else example.loss_mask
    pictures = with_pictures(example.tokens, mask, conversation.messages, rules)
    files = [reference for reference in references_of(conversation.messages) if not reference.startswith("data:")]
    return example._replace(tokens=pictures.tokens, loss_mask=pictures.loss_mask, media=pictures.media, media_files=tuple(files))
