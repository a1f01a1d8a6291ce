"""Put the turns of a conversation with tools into as few examples as their tokens allow.

One example for each turn would repeat all tokens before the turn, a cost that grows with the square of the number of calls.
Turns share an example if the encoding of the conversation up to the earlier turn is a prefix of the encoding up to the later
one, token for token. It is not, for example, where a new user turn moves the tools.

Up to v11 a call is generated without an id: the server adds a random one, which later turns see. The two forms of a call
differ from the end of its arguments on (v3, v7) or from the end of its name on (v11). What comes before a turn is always
written as served, with the ids of earlier calls. Of a call that later turns follow, the tokens that both forms have are trained
on, and the id is not. The last turn of an example is written as it is generated. Where no example ends with a call,
the remainder of the first call as it is generated gets an example of its own, so that the end of a call is trained on as it is
generated; for the other calls this would cost the square again.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import ToolCall
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from moe_train.data.chat.example import WITHOUT_ID, Example, MergedTurns, Turn, restart_reason, turns
from moe_train.data.records.normal_form import Message

_MOST_ENCODED = 64  # encoded prefixes of a conversation, apart from those before a new user turn
_ANCHOR = 4  # tokens that must be equal for two forms of a call to be aligned again after a difference
_LONGEST_REMOVED = 8  # tokens of a call as it is generated that later turns do not see at one place: `}}` and `]`
_LONGEST_ADDED = 64  # tokens of an id with what is around it; an id has nine characters


class _Span(NamedTuple):
    """A turn in a row: `tokens[start:end]`."""

    start: int
    end: int
    generated: list[int]


@dataclasses.dataclass
class _Row:
    """Turns that share an example."""

    restart: str | None
    tokens: list[int]
    """The tokens up to the end of the last turn, as later turns see them."""
    spans: list[_Span]

    def seen(self, span: _Span) -> list[int]:
        """Return the tokens of a turn as later turns see them."""
        return self.tokens[span.start : span.end]


def merged_examples(messages: list[Message], prefixes: Prefixes) -> list[Example]:
    """Put the turns of a conversation that are trained on into examples.

    Args:
        messages: The conversation.
        prefixes: Its encoder.

    Returns:
        The examples in the order of their first turns, then the one for the first call as it is generated, if it is needed.
    """
    rows: list[_Row] = []
    previous_end = 0
    all_turns = turns(messages)
    for numbers in _stretches(all_turns, messages):
        end = all_turns[numbers[-1]].end
        tokens, spans = prefixes.encode(numbers, end)
        if rows and tokens[: len(rows[-1].tokens)] == rows[-1].tokens:
            rows[-1].tokens = tokens
            rows[-1].spans += spans
        else:
            between = messages[previous_end : all_turns[numbers[0]].start]
            rows.append(_Row(restart_reason(between) if rows else None, tokens, spans))
        previous_end = end
    call = _first_call(rows)
    examples = [_example(row, call) for row in rows]
    if call is not None:
        examples.append(_call_example(*call))
    return examples


def _stretches(all_turns: list[Turn], messages: list[Message]) -> list[range]:
    """Group the turns that are trained on, so that it is enough to encode the conversation up to the end of each group.

    A group is a single turn; in a conversation of more than `_MOST_ENCODED` turns, several turns with only results between them,
    so that the time to compare prefixes does not grow with the square of the number of turns.
    """
    longest = -(-len(all_turns) // _MOST_ENCODED)
    groups: list[range] = []
    for i, turn in enumerate(all_turns):
        if not turn.trained_on:
            continue
        between = messages[all_turns[i - 1].end : turn.start]
        only_results = all(message["role"] == "tool" for message in between)
        if groups and groups[-1].stop == i and len(groups[-1]) < longest and only_results:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _first_call(rows: list[_Row]) -> tuple[_Row, _Span] | None:
    """Return the first turn that is generated differently; None if there is none, or an example ends with such a turn."""
    if any(row.seen(row.spans[-1]) != row.spans[-1].generated for row in rows):
        return None
    for row in rows:
        for span in row.spans:
            if row.seen(span) != span.generated:
                return row, span
    return None


def _example(row: _Row, call: tuple[_Row, _Span] | None) -> Example:
    """Return a row as an example; of the turn in `call` only the beginning is trained on, as the rest has its own example."""
    last = row.spans[-1]
    tokens = row.tokens[: last.start] + last.generated
    mask = [False] * last.start + [True] * len(last.generated)
    for span in row.spans[:-1]:
        seen = row.seen(span)
        if call is not None and span is call[1]:
            num_common = _num_common(seen, span.generated)
            mask[span.start : span.start + num_common] = [True] * num_common
        else:
            mask[span.start : span.end] = _aligned(seen, span.generated)
    ends = (*(span.end for span in row.spans[:-1]), len(tokens))
    separate_tokens = sum(span.start + len(span.generated) for span in row.spans)
    return Example(tokens, mask, MergedTurns(ends, separate_tokens, row.restart))


def _call_example(row: _Row, span: _Span) -> Example:
    """Return the example for the remainder of a call as it is generated: what differs from the call that later turns see."""
    tokens = row.tokens[: span.start] + span.generated
    num_elsewhere = span.start + _num_common(row.seen(span), span.generated)
    mask = [False] * num_elsewhere + [True] * (len(tokens) - num_elsewhere)
    return Example(tokens, mask, MergedTurns((len(tokens),), 0, WITHOUT_ID))


def _num_common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _aligned(seen: list[int], generated: list[int]) -> list[bool]:
    """Return which tokens of a turn as later turns see it are also generated, in the same order; the others belong to ids.

    After each difference, both are searched within a short distance for the place from which they are equal again, so the time
    is linear. Nothing is trained on after a difference without such a place.
    """
    if seen == generated:
        return [True] * len(seen)
    mask = [False] * len(seen)
    i = 0
    j = 0
    while i < len(seen) and j < len(generated):
        if seen[i] == generated[j]:
            mask[i] = True
            i += 1
            j += 1
            continue
        place = _next_equal(seen, i, generated, j)
        if place is None:
            break
        i, j = place
    return mask


def _next_equal(seen: list[int], i: int, generated: list[int], j: int) -> tuple[int, int] | None:
    """Return the next places in both from which `_ANCHOR` tokens, or all that remain, are equal; None if they are far away."""
    for removed in range(_LONGEST_REMOVED + 1):
        rest = generated[j + removed : j + removed + _ANCHOR]
        if not rest:
            break
        for added in range(_LONGEST_ADDED + 1):
            if seen[i + added : i + added + _ANCHOR] == rest:
                return i + added, j + removed
    return None


# --- encoding prefixes ----------------------------------------------------------------------------------------------


class Prefixes:
    """Encodes prefixes of a conversation with mistral-common, which normalizes and tokenizes each message once.

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
        self._normalizer = copy.copy(normalizer)
        self._encoder = copy.copy(encoder)
        # mistral-common handles a prefix message by message; what it made of a message is looked up in longer prefixes.
        vars(self._normalizer)["_aggregate_role"] = _remembered_groups(normalizer._aggregate_role)
        self._segments: list[list[int]] = []
        for name in ("encode_user_message", "encode_assistant_message", "encode_tool_message", "encode_system_message"):
            vars(self._encoder)[name] = self._recorded(getattr(encoder, name))

    def encode(self, numbers: range, end: int) -> tuple[list[int], list[_Span]]:
        """Encode the conversation up to the end of a turn.

        Args:
            numbers: Which turns to locate, counted over all turns of the assistant; the last one ends the encoded messages.
            end: Number of messages to encode.

        Returns:
            The tokens, with the ids of calls, and the spans of the turns.
        """
        prefix = self._request.model_copy(update={"messages": self._request.messages[:end]})
        normal = self._normalizer.from_chat_completion_request(prefix)
        self._segments.clear()
        tokens = self._encoder.encode_instruct(normal).tokens
        ends = list(itertools.accumulate(map(len, self._segments), initial=len(self._encoder.start())))
        assert ends[-1] == len(tokens), "mistral-common does not encode a conversation message by message"
        assistant_messages = [i for i, message in enumerate(normal.messages) if isinstance(message, AssistantMessage)]
        spans = []
        for number in numbers:
            i = assistant_messages[number]
            spans.append(_Span(ends[i], ends[i + 1], self._as_generated(normal.messages[i], self._segments[i])))
        assert spans[-1].end == len(tokens), "mistral-common writes something after the assistant's last turn"
        return tokens, spans

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
        if not group:
            return aggregate(group, role, call_ids)
        key = (id(group[0]), len(group))
        if key not in results:
            results[key] = aggregate(group, role, call_ids)
        return results[key]

    return remembered
