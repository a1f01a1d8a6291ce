"""Encode prefixes of a conversation with mistral-common, at the cost of encoding the conversation once.

mistral-common normalizes and encodes a conversation message by message. What it makes of a message in one prefix is looked up
in the next, so that a longer prefix costs little more than the comparison of its tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import ToolCall
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.chat.mistral_media import media_of


class TurnSpan(NamedTuple):
    """A turn of the assistant in the tokens of a conversation: `tokens[start:end]`."""

    start: int
    end: int
    generated: list[int]
    """The tokens of the turn as the assistant generates them: calls have no ids."""


class EncodedPrefix(NamedTuple):
    """The conversation up to the end of a turn."""

    tokens: list[int]
    spans: list[TurnSpan]
    media: tuple[bytes, ...]
    """Content of the pictures, or of the clips of sound, that tokens stand for, in the order of the tokens."""


class Prefixes:
    """Encodes prefixes of one conversation.

    Args:
        request: The conversation, validated.
        normalizer: mistral-common's normalizer.
        encoder: mistral-common's encoder.
        generates_ids: Whether a call is generated as later turns see it.
    """

    def __init__(
        self,
        request: ChatCompletionRequest[Any],
        normalizer: InstructRequestNormalizer,
        encoder: InstructTokenizerBase,
        generates_ids: bool,
    ) -> None:
        self._request = request
        self._plain = encoder
        self._generates_ids = generates_ids
        # Copies, since the methods that are replaced below remember the messages of this conversation alone.
        self._normalizer = copy.copy(normalizer)
        self._encoder = copy.copy(encoder)
        vars(self._normalizer)["_aggregate_role"] = _remembered_groups(normalizer._aggregate_role)
        self._segments: list[list[int]] = []
        for name in ("encode_user_message", "encode_assistant_message", "encode_tool_message", "encode_system_message"):
            vars(self._encoder)[name] = self._recorded(getattr(encoder, name))

    def encode(self, numbers: range, end: int) -> EncodedPrefix:
        """Encode the conversation up to the end of a turn.

        Args:
            numbers: Which turns to locate, counted over all turns of the assistant; the last one ends the encoded messages.
            end: Number of messages to encode.

        Returns:
            The tokens, with the ids of calls, the spans of the turns, and the pictures or the sound.
        """
        prefix = self._request.model_copy(update={"messages": self._request.messages[:end]})
        normal = self._normalizer.from_chat_completion_request(prefix)
        self._segments.clear()
        encoded = self._encoder.encode_instruct(normal)
        tokens = encoded.tokens
        ends = list(itertools.accumulate(map(len, self._segments), initial=len(self._encoder.start())))
        # Both assertions guard the loss mask against another version of mistral-common that encodes differently.
        assert ends[-1] == len(tokens), "mistral-common does not encode a conversation message by message"
        assistant_messages = [i for i, message in enumerate(normal.messages) if isinstance(message, AssistantMessage)]
        spans = []
        for number in numbers:
            i = assistant_messages[number]
            spans.append(TurnSpan(ends[i], ends[i + 1], self._as_generated(normal.messages[i], self._segments[i])))
        assert spans[-1].end == len(tokens), "mistral-common writes something after the assistant's last turn"
        return EncodedPrefix(tokens, spans, media_of(encoded))

    def _as_generated(self, message: AssistantMessage, seen: list[int]) -> list[int]:
        """Return the tokens of a message as the assistant generates them, given those that later turns see."""
        if self._generates_ids or not message.tool_calls:
            return seen
        calls = [ToolCall(function=call.function) for call in message.tool_calls]
        return self._plain.encode_assistant_message(message.model_copy(update={"tool_calls": calls}), False)

    def _recorded(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Return an encoder of messages that encodes each once, and appends its tokens to `_segments`."""
        results: dict[Any, tuple[Any, Any]] = {}

        def recorded(message: Any = None, *args: Any, **kwargs: Any) -> Any:
            """Return the result for a message."""
            # What else decides the result is whether the message is the first or last of its kind, and the system text.
            key = (id(message), *(value for value in (*args, *kwargs.values()) if isinstance(value, bool | str)))
            if key not in results:
                results[key] = (encode(message, *args, **kwargs), message)  # a reference keeps the message's id from being reused
            result = results[key][0]
            self._segments.append(result[0] if isinstance(result, tuple) else result)
            return result

        return recorded


def _remembered_groups(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that normalizes each group of consecutive messages of a role once.

    The messages are those of one conversation, so a group is known by its first message and its size.
    """
    results: dict[Any, Any] = {}

    def remembered(group: list[Any], role: Any, call_ids: list[str]) -> Any:
        """Return the result for a group."""
        # The ids of calls before the group are no part of the key: in every prefix the same call precedes it.
        if not group:
            return aggregate(group, role, call_ids)
        key = (id(group[0]), len(group))
        if key not in results:
            results[key] = aggregate(group, role, call_ids)
        return results[key]

    return remembered
