"""Conversations with a Mistral tokenizer: mistral-common validates and encodes them, and this file computes the loss mask.

As in Mistral's own fine-tuner, every token of the assistant is trained on, reasoning and EOS included, and nothing else. The
tokens before a turn of a conversation with tools depend on its position: tools come before the last user turn (from v13 on
before the first), and v2 omits older calls. `mistral_trajectory` finds the turns that can share an example. Reasoning stays in
all turns, as in mistral-common.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.chat.example import EXTEND_VOCAB, Example, RenderedPrompt, turns, uses_tools, without_tools
from moe_train.data.chat.mistral_media import check_media, media_chunk, media_files, media_of, read_files_with
from moe_train.data.chat.mistral_prefixes import Prefixes
from moe_train.data.chat.mistral_refusals import refusal
from moe_train.data.chat.mistral_settings import check_written, request_fields
from moe_train.data.chat.mistral_trajectory import merged_examples
from moe_train.data.chat.mistral_transcription import is_transcription, transcription_example, transcription_prompt
from moe_train.data.chat.pieces import trained_ids
from moe_train.data.records.normal_form import MEDIA, Conversation, Message
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.mistral import Mistral

_FIRST_WITH_TOOLS = TokenizerVersion.v2
_FIRST_WITHOUT_IDS = TokenizerVersion.v13  # from this version on, ids of calls are never encoded

_KNOWN = {TokenizerVersion(version) for version in ("v2", "v3", "v7", "v11", "v13", "v15")}
"""Versions whose control tokens show where an assistant turn begins."""


def examples(conversation: Conversation, tokenizer: Mistral) -> list[Example]:
    """Convert a conversation to training examples; with tools, call `check_has_tools` first.

    Returns:
        One example, or several for a conversation with tools (see `mistral_trajectory`); none if no turn is trained on.

    Raises:
        Problem: If mistral-common rejects the conversation.
    """
    messages = conversation.messages
    check_written(conversation, tokenizer)
    check_media(conversation, tokenizer)
    if is_transcription(conversation):
        with _refusals(conversation, tokenizer):
            return [transcription_example(conversation, _instruct(tokenizer), tokenizer)]
    if not uses_tools(conversation):
        return [_all_turns(conversation, tokenizer)]
    trained = [turn for turn in turns(messages) if turn.trained_on]
    if not trained:
        return []
    # What follows the last trained turn does not change the examples, so that it is not encoded.
    request = _validated(conversation._replace(messages=messages[: trained[-1].end]), tokenizer, ValidationMode.finetuning)
    _, normalizer = _rules(tokenizer, ValidationMode.finetuning)
    prefixes = Prefixes(request, normalizer, _instruct(tokenizer), tokenizer.finetuning.version >= _FIRST_WITHOUT_IDS)
    with _refusals(conversation, tokenizer):
        return merged_examples(messages, prefixes, tokenizer)


def prompt(conversation: Conversation, tokenizer: Mistral) -> RenderedPrompt:
    """Return the prompt up to where the assistant's next turn begins."""
    check_written(conversation, tokenizer)
    check_media(conversation, tokenizer)
    if is_transcription(conversation):
        with _refusals(conversation, tokenizer):
            return transcription_prompt(conversation, _instruct(tokenizer))
    request = _request(conversation, tokenizer, ValidationMode.test)
    with _refusals(conversation, tokenizer):
        encoded = _instruct(tokenizer).encode_instruct(request)
    return RenderedPrompt(encoded.tokens, media_of(encoded))


def check_has_tools(tokenizer: Mistral) -> None:
    """Raise Problem if the tokenizer's version has no tokens for tools."""
    version = tokenizer.finetuning.version
    if version < _FIRST_WITH_TOOLS:
        why = f"{tokenizer.files[0].name}, a tokenizer of version {version.value}, has no tokens for them"
        raise without_tools(f"{why}; versions v2, v3, v7, v11, v13 and v15 have them", f"{EXTEND_VOCAB}, or drop the record")


def _all_turns(conversation: Conversation, tokenizer: Mistral) -> Example:
    """Encode a conversation without tools.

    Each turn ends with EOS, and EOS occurs nowhere else: the length of a turn is counted back from its EOS.
    """
    request = _request(conversation, tokenizer, ValidationMode.finetuning)
    with _refusals(conversation, tokenizer):
        encoded = _instruct(tokenizer).encode_instruct(request)
    tokens = encoded.tokens
    mask = [False] * len(tokens)
    ends = [i + 1 for i, token in enumerate(tokens) if token == tokenizer.eos_id]
    assistant_messages = [message for message in request.messages if isinstance(message, AssistantMessage)]
    # The normalizer has joined consecutive messages of the assistant, which `turns` counts as one turn, too.
    for end, message, turn in zip(ends, assistant_messages, turns(conversation.messages), strict=True):
        start = end - _length_of_last(tokens[:end], message, tokenizer)
        if turn.trained_on:
            mask[start:end] = trained_ids(tokens[start:end], conversation.messages[turn.start : turn.end], tokenizer)
    return Example(tokens, mask, media=media_of(encoded), media_files=media_files(conversation.messages))


def _length_of_last(tokens: list[int], message: AssistantMessage, tokenizer: Mistral) -> int:
    """Return how many tokens at the end of `tokens` belong to the message.

    These are the tokens after the control token that closes what comes before the message. Versions without such a token encode
    the message on its own to count them.
    """
    closing = _closing(tokenizer)
    if closing:
        # `i` of 0 is the message's own EOS, which is among the closing tokens.
        return next(i for i, token in enumerate(reversed(tokens)) if i and token in closing)
    encoded = _instruct(tokenizer).encode_assistant_message(message, False)
    assert tokens[len(tokens) - len(encoded) :] == encoded, "mistral-common put an assistant's turn elsewhere"
    return len(encoded)


_CLOSING = (
    SpecialTokens.bos,  # of a conversation that begins with the assistant
    SpecialTokens.end_inst,
    SpecialTokens.end_tool_results,
    SpecialTokens.end_system,
    SpecialTokens.eos,
)


@functools.lru_cache(maxsize=8)
def _closing(tokenizer: Mistral) -> frozenset[int]:
    """Return the ids that precede an assistant turn, for versions where every turn has one; v1 writes its turns as plain text."""
    if tokenizer.finetuning.version not in _KNOWN:
        return frozenset()
    pieces = {piece.value for piece in _CLOSING}
    text = _instruct(tokenizer).tokenizer
    return frozenset(number for number in tokenizer.control_ids if text.id_to_piece(number) in pieces)


@functools.lru_cache(maxsize=8)
def _instruct(tokenizer: Mistral) -> InstructTokenizerBase:
    """Return mistral-common's encoder without its decoding of the tokens back to text.

    That decoding takes most of the encoder's time, for a field that nothing reads.
    """
    encoder = copy.copy(tokenizer.finetuning.instruct_tokenizer)
    assert isinstance(encoder, InstructTokenizerBase)
    # An attribute of the copy shadows the method of its class, so that the tokenizer's own encoder still decodes.
    vars(encoder)["decode"] = _no_decoding
    read_files_with(encoder, tokenizer)
    return encoder


def _no_decoding(*_: Any, **__: Any) -> str:
    """Stand in for the encoder's `decode`."""
    return ""


def _request(conversation: Conversation, tokenizer: Mistral, mode: ValidationMode) -> InstructRequest:
    """Validate and normalize a conversation.

    Consecutive messages of a role are joined, and system texts are moved to where the tokenizer's version has them.
    """
    request = _validated(conversation, tokenizer, mode)
    _, normalizer = _rules(tokenizer, mode)
    with _refusals(conversation, tokenizer):
        return normalizer.from_chat_completion_request(request)


def _validated(conversation: Conversation, tokenizer: Mistral, mode: ValidationMode) -> ChatCompletionRequest[Any]:
    """Parse a conversation, and validate it."""
    with _refusals(conversation, tokenizer):
        parsed_tools = [Tool.from_openai(tool) for tool in conversation.tools] or None
        messages = [_plain(message) for message in conversation.messages]
        fields = {"messages": messages, "tools": parsed_tools, **request_fields(conversation.settings)}
        request: ChatCompletionRequest[Any] = ChatCompletionRequest.model_validate(fields)
        validator, _ = _rules(tokenizer, mode)
        validator.validate_request(request)
        return request


@functools.lru_cache(maxsize=8)
def _rules(tokenizer: Mistral, mode: ValidationMode) -> tuple[Any, Any]:
    """Return mistral-common's validator and normalizer for the tokenizer's version."""
    version = tokenizer.finetuning.version
    settings = _instruct(tokenizer).tokenizer.model_settings_builder
    return get_validator(version, mode), get_normalizer(version, settings)


_KEYS = {"assistant": ("content", "tool_calls"), "tool": ("content", "tool_call_id", "name")}


def _plain(message: Message) -> Message:
    """Keep only the keys that mistral-common knows, since it rejects others."""
    plain = {"role": message["role"], **{key: message[key] for key in _KEYS.get(message["role"], ("content",)) if key in message}}
    if isinstance(plain.get("content"), list):
        plain["content"] = [media_chunk(part) if part["type"] in MEDIA else part for part in plain["content"]]
    if "tool_calls" in plain:
        plain["tool_calls"] = [ToolCall.from_openai(call) for call in plain["tool_calls"]]
    return plain


@contextlib.contextmanager
def _refusals(conversation: Conversation, tokenizer: Mistral) -> Iterator[None]:
    """Convert what mistral-common raises for a conversation to a Problem."""
    try:
        yield
    except Problem:  # of our own, such as a text that is too long
        raise
    # A RuntimeError is of sentencepiece, for text that is not Unicode, or of Python, for JSON that is nested too deep.
    except (MistralCommonException, RuntimeError, AssertionError, ValueError) as error:
        raise refusal(error, conversation, tokenizer) from error
