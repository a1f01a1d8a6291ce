"""Turns of which the loss covers only some pieces: which tokens are trained on.

A token with characters of several pieces is trained on if trained pieces have some of them, and untrained ones nothing but white
space: a word whose token begins with the space before it is trained on with that token. What a chat format writes around the
texts of a turn, such as its end token, is trained on as in any other turn.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence

from moe_train.data.chat.renderings import marked_text
from moe_train.data.records.normal_form import JOINT, Message, Piece, pieces_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Span

Layer = tuple[Span, bool]
"""A part of a text, and whether tokens that touch it are trained on, unless a later layer says otherwise."""


def layers(pieces: Sequence[Piece]) -> list[Layer]:
    """Return the layers of a text in pieces."""
    trained: list[Layer] = []
    untrained: list[Layer] = []
    words: list[Layer] = []
    position = 0
    for piece in pieces:
        end = position + len(piece.text)
        if piece.trained_on:
            trained.append(((position, end), True))
        else:
            untrained.append(((position, end), False))
            words.append(((end - len(piece.text.lstrip()), position + len(piece.text.rstrip())), False))
        position = end
    # Untrained pieces first, then whatever reaches into a trained one, then what is not white space of the untrained ones.
    return [layer for layer in (*untrained, *trained, *words) if layer[0][0] < layer[0][1]]


def has_pieces(messages: Sequence[Message]) -> bool:
    """Return whether the loss covers only pieces of one of the messages."""
    return any("pieces" in message for message in messages)


def layers_of_turns(
    text: str, turns: Sequence[Span], turn_messages: Sequence[Sequence[Message]], special_pattern: re.Pattern[str]
) -> tuple[Layer, ...]:
    """Return the layers of the turns of a rendered text.

    Args:
        text: The text, with marks around what looks like a control token (`renderings`).
        turns: The spans of the text that are trained on.
        turn_messages: The messages of each turn.
        special_pattern: Matches text that looks like a control token.

    Raises:
        Problem: If there are other spans than turns, or a text in pieces is not in its turn, or more than once, so that its pieces
            cannot be located.
    """
    if not any(map(has_pieces, turn_messages)):
        return ()
    if len(turn_messages) != len(turns):
        message = "the loss covers pieces of a turn, and the chat template marks several generations in one message"
        raise Problem("template", message, "put one {% generation %} … {% endgeneration %} around each message")
    result: list[Layer] = []
    for turn, messages in zip(turns, turn_messages, strict=True):
        if has_pieces(messages):
            result += _layers_of_turn(text, turn, messages, special_pattern)
    return tuple(result)


def _layers_of_turn(text: str, turn: Span, messages: Sequence[Message], special_pattern: re.Pattern[str]) -> list[Layer]:
    """Return the layers of a turn in a rendered text. Raises Problem if a text in pieces cannot be located in it."""
    result: list[Layer] = []
    position, end = turn
    for message in messages:
        for pieces in pieces_of(message):
            plain = "".join(piece.text for piece in pieces)
            # Templates often strip what they write.
            stripped = plain.strip()
            searched = marked_text(stripped, special_pattern)
            start = text.find(searched, position, end) if stripped else -1
            partial = not all(piece.trained_on for piece in pieces)
            if partial and stripped and (start < 0 or text.find(searched, start + 1, end) >= 0):
                raise _not_located("the chat template writes the text of a turn in another form, or more than once")
            if start < 0:
                continue
            position = start + len(searched)
            if partial:
                # The position at which the text begins with the white space that the template may have stripped.
                origin = start - (len(plain) - len(plain.lstrip()))
                written = marked_text(plain, special_pattern)
                if origin >= turn[0] and text.startswith(written, origin):
                    start, position = origin, min(origin + len(written), end)
                marks = _Marks(plain, special_pattern)
                for (first, last), trained_on in layers(pieces):
                    span = (max(origin + marks.position(first), start), min(origin + marks.position(last), position))
                    if span[0] < span[1]:
                        result.append((span, trained_on))
    return result


def check_effective(layered: Sequence[tuple[Span, bool, str]], mask: Sequence[bool]) -> None:
    """Check that each trained piece has a token that is trained on.

    Args:
        layered: For each layer its ids (first, last + 1), whether it is trained on, and its text.
        mask: Which ids are trained on.

    Raises:
        Problem: If all tokens of a piece are also those of a piece that is not trained on.
    """
    for (first, stop), trained_on, text in layered:
        if trained_on and text.strip() and not any(mask[first:stop]):
            message = f"the loss is to cover {brief(text)}, whose tokens also belong to text that it is not to cover"
            raise Problem("weight", message, "let the pieces end between words")


class _Marks:
    """The marks around what looks like a control token in a text.

    Args:
        text: The text without marks.
        special_pattern: Matches text that looks like a control token.
    """

    def __init__(self, text: str, special_pattern: re.Pattern[str]) -> None:
        matches = list(special_pattern.finditer(text))
        self._starts = [match.start() for match in matches]
        self._ends = [match.end() for match in matches]

    def position(self, position: int) -> int:
        """Translate a position in the text to one in the text with marks."""
        return position + bisect.bisect_left(self._starts, position) + bisect.bisect_right(self._ends, position)


def trained_ids(ids: Sequence[int], messages: Sequence[Message], tokenizer: Mistral) -> list[bool]:
    """Return which ids of a turn of a Mistral tokenizer are trained on.

    Args:
        ids: The ids of the turn.
        messages: The messages of the turn.
        tokenizer: The tokenizer.

    Raises:
        Problem: If the texts of the messages are not in the turn one after the other.
    """
    mask = [True] * len(ids)
    if not has_pieces(messages):
        return mask
    encoded = tokenizer.bytes_of(ids)
    token_ends = list(itertools.accumulate(map(len, encoded), initial=0))
    turn = b"".join(encoded)
    position = 1 if tokenizer.adds_space and turn.startswith(b" ") else 0
    for message in messages:
        for pieces in pieces_of(message):
            text = tokenizer.as_decoded("".join(piece.text for piece in pieces))
            if not text:
                continue
            position = _start(turn, position, text.encode())
            byte_ends = list(itertools.accumulate((len(character.encode()) for character in text), initial=position))
            layered: list[tuple[Span, bool, str]] = []
            for (start, end), trained_on in layers(pieces):
                # The ids with bytes in the span; control tokens have none, and the last spaces of a turn may be cut off.
                first = bisect.bisect_right(token_ends, byte_ends[start]) - 1
                stop = bisect.bisect_left(token_ends, min(byte_ends[end], len(turn)))
                mask[first:stop] = [trained_on] * max(stop - first, 0)
                layered.append(((first, stop), trained_on, text[start:end]))
            check_effective(layered, mask)
            position = byte_ends[-1]
    return mask


def _start(turn: bytes, position: int, text: bytes) -> int:
    """Return where a text begins in a turn, at a position or after what joins texts."""
    for joint in (JOINT.encode(), b""):
        start = position + len(joint)
        if turn.startswith(joint, position) and turn.startswith(text, start):
            return start
    # Most versions write no spaces at the end of a turn.
    for joint in (JOINT.encode(), b""):
        start = position + len(joint)
        if turn.startswith(joint, position) and turn[start:] == text.rstrip(b" "):
            return start
    raise _not_located("the tokenizer writes the text of a turn in another form")


def _not_located(reason: str) -> Problem:
    """Return the problem for pieces that cannot be located."""
    remedy = "give all parts of the message the same flag, or none (in axolotl's data: train, weight or train_detail)"
    return Problem("weight", f"the loss covers pieces of a turn, and {reason}, so that they cannot be located", remedy)
