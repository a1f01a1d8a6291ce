"""Put the turns of a conversation with tools into as few examples as their tokens allow.

One example for each turn would repeat all tokens before the turn, a cost that grows with the square of the number of calls.
Turns share an example if the encoding of the conversation up to the earlier turn is a prefix of the encoding up to the later
one, token for token. It is not, for example, where a new user turn moves the tools.

Up to v11 a call is generated without an id: the server adds a random one, which later turns see. The two forms of a call
differ from the end of its arguments on (v3, v7) or from the end of its name on (v11). What comes before a turn is always
written as served, with the ids of earlier calls. The last turn of an example is written as it is generated. Of the calls before,
the tokens that both forms have are trained on, and the id is not. So that each conversation trains on a whole call as it is
generated, the first call gets an example of its own if no example ends with a call. For the other calls this would cost the
square again.
"""

from __future__ import annotations

import dataclasses

from moe_train.data.chat.example import WITHOUT_ID, Example, MergedTurns, Turn, restart_reason, turns
from moe_train.data.chat.mistral_prefixes import Prefixes, TurnSpan
from moe_train.data.chat.pieces import trained_ids
from moe_train.data.records.media import references_of
from moe_train.data.records.normal_form import Message
from moe_train.data.tokenizers.mistral import Mistral

_MOST_ENCODED = 64  # encoded prefixes of a conversation, apart from those before a new user turn
_ANCHOR = 4  # tokens that must be equal for two forms of a call to be aligned again after a difference
_LONGEST_REMOVED = 8  # tokens of a call as it is generated that later turns do not see at one place: `}}` and `]`
_LONGEST_ADDED = 64  # tokens of an id with what is around it; an id has nine characters


@dataclasses.dataclass
class _Row:
    """Turns that share an example."""

    restart: str | None
    tokens: list[int]
    """The tokens up to the end of the last turn, as later turns see them."""
    spans: list[TurnSpan]
    turn_messages: list[list[Message]]
    """The messages of each turn."""
    media: tuple[bytes, ...]
    """Content of the pictures, or of the clips of sound, of the tokens."""
    references: list[str]
    """The same files as the messages name them."""

    def seen(self, span: TurnSpan) -> list[int]:
        """Return the tokens of a turn as later turns see them."""
        return self.tokens[span.start : span.end]


def merged_examples(messages: list[Message], prefixes: Prefixes, tokenizer: Mistral) -> list[Example]:
    """Put the turns of a conversation that are trained on into examples.

    Args:
        messages: The conversation.
        prefixes: Its encoder.
        tokenizer: The tokenizer.

    Returns:
        The examples, in the order of the conversation.
    """
    rows: list[_Row] = []
    previous_end = 0
    all_turns = turns(messages)
    for numbers in _stretches(all_turns, messages):
        end = all_turns[numbers[-1]].end
        turn_messages = [messages[all_turns[number].start : all_turns[number].end] for number in numbers]
        encoded = prefixes.encode(numbers, end)
        references = references_of(messages[:end])
        if rows and encoded.tokens[: len(rows[-1].tokens)] == rows[-1].tokens:
            rows[-1].tokens = encoded.tokens
            rows[-1].spans += encoded.spans
            rows[-1].turn_messages += turn_messages
            rows[-1].media = encoded.media
            rows[-1].references = references
        else:
            between = messages[previous_end : all_turns[numbers[0]].start]
            restart = restart_reason(between) if rows else None
            rows.append(_Row(restart, encoded.tokens, encoded.spans, turn_messages, encoded.media, references))
        previous_end = end
    return [_example(row, tokenizer) for row in _with_first_call_alone(rows)]


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
        # A new user turn may move the tools, which the encoding at the end of the group would not show.
        only_results = all(message["role"] == "tool" for message in between)
        if groups and groups[-1].stop == i and len(groups[-1]) < longest and only_results:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _with_first_call_alone(rows: list[_Row]) -> list[_Row]:
    """Move the first turn that is generated differently to a row of its own; do nothing if a row ends with such a turn."""
    if any(row.seen(row.spans[-1]) != row.spans[-1].generated for row in rows):
        return rows
    for i, row in enumerate(rows):
        for j, span in enumerate(row.spans):
            if row.seen(span) != span.generated:
                alone = _Row(row.restart, row.tokens[: span.end], [span], [row.turn_messages[j]], row.media, row.references)
                # A turn is trained on once, so the rest leaves out the one that is alone.
                turn_messages = row.turn_messages[:j] + row.turn_messages[j + 1 :]
                spans = row.spans[:j] + row.spans[j + 1 :]
                rest = _Row(WITHOUT_ID, row.tokens, spans, turn_messages, row.media, row.references)
                return [*rows[:i], alone, rest, *rows[i + 1 :]]
    return rows


def _example(row: _Row, tokenizer: Mistral) -> Example:
    """Return a row as an example; its last turn is written as it is generated."""
    last = row.spans[-1]
    tokens = row.tokens[: last.start] + last.generated
    mask = [False] * last.start + trained_ids(last.generated, row.turn_messages[-1], tokenizer)
    for span, messages in zip(row.spans[:-1], row.turn_messages[:-1], strict=True):
        seen = row.seen(span)
        covered = zip(_aligned(seen, span.generated), trained_ids(seen, messages, tokenizer), strict=True)
        mask[span.start : span.end] = [generated and trained_on for generated, trained_on in covered]
    ends = (*(span.end for span in row.spans[:-1]), len(tokens))
    separate_tokens = sum(span.start + len(span.generated) for span in row.spans)
    # A row that was cut has the first pictures or clips alone.
    count = 0 if tokenizer.media is None else len(tokenizer.media.sizes_in(tokens))
    files = [reference for reference in row.references[:count] if not reference.startswith("data:")]
    merged = MergedTurns(ends, separate_tokens, row.restart, may_be_cut=not count)
    return Example(tokens, mask, merged, media=row.media[:count], media_files=tuple(files))


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
    # Few tokens of the generated form are skipped before many of the seen one: the difference is mostly an id that was added.
    for removed in range(_LONGEST_REMOVED + 1):
        rest = generated[j + removed : j + removed + _ANCHOR]
        if not rest:
            break
        for added in range(_LONGEST_ADDED + 1):
            if seen[i + added : i + added + _ANCHOR] == rest:
                return i + added, j + removed
    return None
