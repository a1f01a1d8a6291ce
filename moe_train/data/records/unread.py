"""Keys of a record that are not read: those that change its meaning are a problem, all others are named and counted."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_train.data.records.problem import Problem, brief

RECORD = ""
MESSAGE = "messages."
PART = "content."
CALL = "tool_calls."
CALLED_FUNCTION = "tool_calls.function."
TOOL = "tools."
TOOL_FUNCTION = "tools.function."

_MEDIA = ("images", "image", "audios", "audio", "videos", "video")
_REASONS = {
    **dict.fromkeys(("label", "labels", "kto_tag"), "it marks an answer as good or bad, and no objective reads it yet"),
    **dict.fromkeys(
        ("chosen", "rejected", "chosen_response", "rejected_response", "chosen_messages", "rejected_messages"),
        "it belongs to a preference pair, and no objective reads those yet",
    ),
    **dict.fromkeys(_MEDIA, "images, sound and video are not read"),
    **dict.fromkeys(
        ("train", "training", "train_detail", "loss", "loss_weight", "loss_scale", "loss_mask", "weight", "mask", "masked"),
        "it says what the loss covers, and is not read here; a message of the assistant has weight 0 or 1",
    ),
}
MEANING_KEYS = frozenset(_REASONS) | {
    *("system", "system_prompt", "tools", "available_tools", "functions", "function_call", "tool_calls"),
    *("history", "input", "context", "documents", "chat_template_kwargs", "rejected_images"),
    *("reasoning_content", "reasoning", "reasoning_details", "thinking", "prefix", "refusal"),
}
"""Keys that change the meaning of what they stand in."""
# Spelling variants such as lossWeight, loss-weight and loss_weight must not slip past the check.
_NO_LETTER = re.compile(r"[\W_]+")


def _letters(key: str) -> str:
    """Return the letters and digits of a key in lower case, which are the same in all of its spellings."""
    return _NO_LETTER.sub("", key).lower()


_SPELLED = {_letters(key): key for key in MEANING_KEYS}
MAX_NAMES = 1000
"""Largest number of distinct names that are counted; later names are counted together."""
OTHERS = "other keys"
"""The name under which keys beyond `MAX_NAMES` are counted."""


class NotLoaded:
    """The value of a column that is known by its name alone, since only wanted columns of a table are loaded."""

    def __repr__(self) -> str:
        return "(not loaded)"


NOT_LOADED = NotLoaded()


class Unread:
    """The keys of one record that are not read, by name: `label` of the record, `messages.name` of a message.

    Every object of a record goes through `opened`; what is read of it is taken out, and what is left goes to `close`.

    Args:
        ignore: Keys that are not to be read, as names or as bare keys.
    """

    # One is made for each record.
    __slots__ = ("ignore", "names")

    def __init__(self, ignore: Collection[str] = ()) -> None:
        self.ignore = ignore
        # A dict as an ordered set: names are shown in the order of the record.
        self.names: dict[str, None] = {}

    def opened(self, level: str, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of an object without nulls and without keys that are ignored by name."""
        remaining = {key: value for key, value in entries.items() if value is not None}
        if self.ignore:
            for key in [key for key in remaining if key in self.ignore or f"{level}{key}" in self.ignore]:
                del remaining[key]
                self.names[_name(level, key)] = None
        return remaining

    def close(self, location: str, level: str, remaining: Mapping[str, Any]) -> None:
        """Note the keys that were not read.

        Args:
            location: What the object is, for a message.
            level: The level of the object.
            remaining: The keys that are left, with their values.

        Raises:
            Problem: If a key changes the meaning.
        """
        for key, value in remaining.items():
            meaning = meaning_key(str(key))
            # In the definition of a tool these keys do not have that meaning, so they are only named.
            if meaning is not None and level not in (TOOL, TOOL_FUNCTION):
                if is_empty(value):
                    continue
                reason = _REASONS.get(meaning, "it changes the meaning, and is not read here")
                name = _name(level, key)
                remedy = f"drop the record, or leave the key out by name: --ignore {name} (in a config: ignore: [{name}] of record)"
                raise Problem("unread-key", f"{location} has the key {brief(key)}: {reason}", remedy)
            self.names[_name(level, key)] = None


@functools.lru_cache(maxsize=4096)
def meaning_key(key: str) -> str | None:
    """Return the key that changes the meaning, in its usual spelling, such as `loss_weight` for `lossWeight`; None for others."""
    return _SPELLED.get(_letters(key))


def is_empty(value: object) -> bool:
    """Return whether a value says nothing, so that a key with it need not be read."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_ignored(name: str, ignore: Collection[str]) -> bool:
    """Return whether a key is among those that are ignored, given by their names or as bare keys."""
    return name in ignore or any(name.endswith(f".{key}") for key in ignore)


def _name(level: str, key: object) -> str:
    """Return the name of a key of a level."""
    text = str(key)
    return level + (text if len(text) <= 60 else text[:57] + "...")


def count(total: Counter[str], names: Iterable[str], by: int = 1) -> None:
    """Add names to a count, of which the number of distinct names stays bounded."""
    for name in names:
        total[name if name in total or len(total) < MAX_NAMES else OTHERS] += by


def add_counts(total: Counter[str], counts: Mapping[str, int]) -> None:
    """Add counts to a count, of which the number of distinct names stays bounded."""
    for name, number in counts.items():
        count(total, (name,), number)


def in_words(counts: Mapping[str, int], shown: int = 12) -> str:
    """Describe counts in a line, such as `label (300 records), tools (12)`; empty if there are none."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts: list[str] = []
    for name, number in ordered[:shown]:
        unit = ""
        if not parts:
            unit = " record" if number == 1 else " records"
        parts.append(f"{name} ({number:,}{unit})")
    if len(ordered) > shown:
        parts.append(f"and {len(ordered) - shown:,} more")
    return ", ".join(parts)
