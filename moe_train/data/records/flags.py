"""Flags that say whether the loss covers a message or pieces of it: every trainer's spelling of `weight`.

Pieces of a text have flags in two spellings, both axolotl's: parts of a content with a flag each, which put together are the text,
and `train_detail`, ranges of characters of the text. What no range covers is not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_train.data.records.normal_form import Piece
from moe_train.data.records.problem import Problem, brief

# Mistral's and OpenAI's weight, axolotl's train and training, ms-swift's loss, LLaMA-Factory's loss_weight
_FLAGS = ("weight", "train", "training", "loss", "loss_weight")
_DETAILS = ("train_detail", "training_detail")
_RANGE = ("begin_offset", "end_offset")
_DETAIL_REMEDY = (
    "write a list of {begin_offset, end_offset, train}, where the offsets are those of the first and the last character"
)
# Also as text, which is all that CSV holds, and as floats, which some tables hold in place of integers.
_VALUES = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
_NOT_THE_ASSISTANT = {"system", "user", "tool", "human", "observation", "developer", "function"}


class FlaggedPiece(NamedTuple):
    """A piece of a text, with the flag that the record states for it."""

    text: str
    flag: int | None
    """1 if the loss covers it, 0 if not; None if the record does not say."""


class Loss(NamedTuple):
    """What the loss covers of a message."""

    flag: int | None
    """1 if the loss covers the message or pieces of it, 0 if nothing of it; None if the record does not say."""
    pieces: list[list[Piece]]
    """The texts of the message in pieces, if the loss covers only some of them; empty otherwise."""


def take_flag(remaining: dict[str, Any], location: str, role: object) -> int | None:
    """Take the flags out of a message or a part of it.

    Args:
        remaining: The keys that have not been read yet.
        location: What the object is, for a message.
        role: The role of the message.

    Returns:
        1 if the loss covers it, 0 if not; None if it does not say, or if it is not the assistant's.

    Raises:
        Problem: If flags contradict each other, a value is neither 0 nor 1, or the loss is to cover what is not the assistant's.
    """
    flag: int | None = None
    first = ""
    for name in _FLAGS:
        if name not in remaining:
            continue
        value = remaining.pop(name)
        meant = _meaning(value)
        if meant is None:
            raise Problem("weight", f"{location} has {name} {brief(value)}", "a weight is 0 (no loss) or 1")
        if flag is not None and meant != flag:
            raise Problem("weight", f"{location} has both {first} and {name}, which contradict each other", "keep one of them")
        # A weight on another role has no effect; the other names ask for a loss there, which must not be dropped silently.
        if meant and name != "weight" and _is_not_the_assistant(role):
            raise _no_loss(location, role, name)
        flag = meant
        first = name
    return None if _is_not_the_assistant(role) else flag


def take_detail(remaining: dict[str, Any], location: str, role: object, text: object) -> list[FlaggedPiece]:
    """Take the ranges of characters with flags out of a message.

    Args:
        remaining: The keys that have not been read yet.
        location: What the object is, for a message.
        role: The role of the message.
        text: The content of the message.

    Returns:
        The text in pieces; empty if the message has no such ranges, or if it is not the assistant's.

    Raises:
        Problem: If ranges overlap, a range is not within the text, or the loss is to cover what is not the assistant's.
    """
    names = [name for name in _DETAILS if name in remaining]
    if not names:
        return []
    details = [remaining.pop(name) for name in names]
    if len(details) > 1 and details[0] != details[1]:
        raise Problem("weight", f"{location} has both {names[0]} and {names[1]}, which differ", "keep one of them")
    value = details[0]
    if not isinstance(value, list | tuple) or not value:
        raise Problem("weight", f"{location} has {names[0]} {brief(value)}", _DETAIL_REMEDY)
    if not isinstance(text, str):
        remedy = "write the content as a text, or give its parts flags of their own"
        raise Problem("weight", f"{location} has {names[0]}, and its content is no text", remedy)
    ranges = sorted(_range(entry, f"{names[0]} of {location}", len(text)) for entry in value)
    pieces: list[FlaggedPiece] = []
    position = 0
    for begin, end, flag in ranges:
        if begin < position:
            message = f"{names[0]} of {location} has two ranges with character {begin}"
            raise Problem("weight", message, "let no ranges overlap; end_offset is that of the last character in a range")
        if flag and _is_not_the_assistant(role):
            raise _no_loss(location, role, names[0])
        pieces += [FlaggedPiece(text[position:begin], 0), FlaggedPiece(text[begin:end], flag)]
        position = end
    pieces.append(FlaggedPiece(text[position:], 0))
    return [] if _is_not_the_assistant(role) else [piece for piece in pieces if piece.text]


def _range(entry: object, location: str, size: int) -> tuple[int, int, int]:
    """Return a range of characters as (start, end, flag), given the number of characters of the text."""
    malformed = Problem("weight", f"{location} has {brief(entry)}", _DETAIL_REMEDY)
    if not isinstance(entry, dict) or {key for key, value in entry.items() if value is not None} != {*_RANGE, "train"}:
        raise malformed
    flag = _meaning(entry["train"])
    if flag is None:
        raise malformed
    begin = entry["begin_offset"]
    last = entry["end_offset"]
    for offset in (begin, last):
        # Tables hold integers as floats where a column has nulls.
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not float(offset).is_integer():
            raise Problem("weight", f"{location} has the offset {brief(offset)}", _DETAIL_REMEDY)
    if not 0 <= begin <= last < size:
        message = f"{location} has the range {int(begin)} to {int(last)}, and the text has the characters 0 to {size - 1}"
        raise Problem("weight", message, "correct the range; end_offset is that of the last character in it")
    return int(begin), int(last) + 1, flag


def loss_of(location: str, whole: int | None, texts: Sequence[Sequence[FlaggedPiece]], calls: Sequence[int | None]) -> Loss:
    """Combine the flag of a message with those of its pieces.

    Args:
        location: What the message is, for a message.
        whole: The flag of the message itself; None if it has none.
        texts: The texts of the message in order.
        calls: The flag of each call of the message; None for a call without one.

    Raises:
        Problem: If the flags contradict each other, or the loss covers a text and not the call beside it.
    """
    stated = [piece.flag for text in texts for piece in text if piece.text]
    if all(flag is None for flag in (*stated, *calls)):
        return Loss(whole, [])
    # A piece without a flag is trained on unless its message says otherwise, as a message without a flag is.
    default = 1 if whole is None else whole
    flags = {default if flag is None else flag for flag in (*stated, *calls)}
    if (whole is not None and whole not in flags) or (whole == 0 and 1 in flags):
        raise Problem("weight", f"the flags of {location} and of its parts contradict each other", "keep one of them")
    if len(flags) == 1:
        return Loss(flags.pop(), [])
    if any((default if flag is None else flag) == 0 for flag in calls):
        message = f"the loss covers some parts of {location}, and a call not"
        raise Problem("weight", message, "give all of its parts the flag 0: a call is trained on where its message is")
    pieces: list[list[Piece]] = []
    for text in texts:
        pieces.append([Piece(piece.text, (default if piece.flag is None else piece.flag) == 1) for piece in text if piece.text])
    return Loss(1, [text for text in pieces if text])


def _meaning(value: object) -> int | None:
    """Return the meaning of a flag, 0 or 1; None if it is neither."""
    return _VALUES.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None


def _is_not_the_assistant(role: object) -> bool:
    """Return whether a role is certainly not the assistant's."""
    return isinstance(role, str) and role in _NOT_THE_ASSISTANT


def _no_loss(location: str, role: object, name: str) -> Problem:
    """Return the problem for a message whose role bears no loss."""
    message = f"{location} is {role}, and {name} asks for a loss on it, which only the assistant's messages bear"
    return Problem("weight", message, "set it to 0, or drop the record")
