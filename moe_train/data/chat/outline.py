"""Outlines: what a chat template writes around contents, of conversations whose messages have the same roles in the same order.

An outline is rendered with contents left open (see `renderer`), and then filled in for each conversation.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from moe_train.data.chat.example import bears_loss
from moe_train.data.chat.renderer import PLACE
from moe_train.data.records.conversation import Conversation
from moe_train.data.tokenizers.huggingface import Marked
from moe_train.data.tokenizers.tokenizer import Span

Order = tuple[tuple[str, bool, bool], ...]
"""Of each message its role, whether it is learnt, and whether it is empty."""

_LONGEST = 32  # messages; longer conversations seldom have the same order


class Place(NamedTuple):
    """Of the content of a message, as it is or stripped."""

    message: int
    stripped: bool


class Outline(NamedTuple):
    """A text in pieces, empty where contents belong; which pieces these are; and its spans, from which piece to which (behind
    the last)."""

    marked: Marked
    pieces: list[str]
    places: list[tuple[int, Place]]
    spans: list[Span]


def order_of(conversation: Conversation) -> Order | None:
    """None for a conversation with tools, or with anything but texts, and for a long one."""
    messages, tools = conversation
    if tools or len(messages) > _LONGEST:
        return None
    order = []
    for message in messages:
        if len(message) - ("weight" in message) != 2 or "content" not in message or message["role"] == "tool":
            return None
        order.append((message["role"], bears_loss(message), not message["content"]))
    return tuple(order)


_PLACES = re.compile(f"([{PLACE[0]}{PLACE[1]}])(\\d+){PLACE[2]}")


def outline_of(marked: Marked) -> Outline | None:
    """The outline in a text whose contents were left open. None where a content stands in it twice: texts are not to be longer
    than what is in them."""
    places = {found.start(): found for found in _PLACES.finditer(marked.text)}
    ends = {found.end() for found in places.values()}
    borders = sorted({0, len(marked.text), *places, *ends, *itertools.chain.from_iterable(marked.spans)})
    pieces = ["" if start in places else marked.text[start:end] for start, end in itertools.pairwise(borders)]
    contents = [(borders.index(start), Place(int(found[2]), found[1] == PLACE[1])) for start, found in places.items()]
    if len({place.message for _, place in contents}) < len(contents):
        return None
    return Outline(marked, pieces, contents, [(borders.index(start), borders.index(end)) for start, end in marked.spans])


def fill(outline: Outline, contents: list[str]) -> Marked:
    """The text with the contents of the messages in their places."""
    marked, pieces, places, spans = outline
    parts = pieces.copy()
    for at, (message, stripped) in places:
        parts[at] = contents[message].strip() if stripped else contents[message]
    ends = [0, *itertools.accumulate(map(len, parts))]
    return Marked("".join(parts), [(ends[start], ends[end]) for start, end in spans], marked.control, marked.edges)
