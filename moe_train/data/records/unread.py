"""Keys of a record that are not read: those that change its meaning are a problem, all others are named and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_train.data.records.meaning import CALL, INSIDE, MESSAGE, PART, lost_meaning
from moe_train.data.records.problem import Problem, brief

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
            reason = lost_meaning(level, str(key))
            if reason is not None and is_empty(value):
                continue
            what = f"{location} has the key {brief(key)}"
            if reason is None and level in (MESSAGE, PART, CALL):
                inner, reason = _lost_inside(value)
                what += f" with {brief(inner)} in it"
            if reason is not None:
                name = _name(level, key)
                remedy = f"drop the record, or leave the key out by name: --ignore {name} (in a config: ignore: [{name}] of record)"
                raise Problem("unread-key", f"{what}: {reason}", remedy)
            self.names[_name(level, key)] = None


def _lost_inside(value: object) -> tuple[str, str | None]:
    """Return the key inside of a value that changes the meaning, and what is lost; ("", None) if there is none.

    Libraries put what their own format has no place for into an object, as LangChain does with calls (`additional_kwargs`) and
    LiteLLM with reasoning (`provider_specific_fields`). Beside a whole record or a tool, such an object only describes it.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            reason = None if is_empty(item) else lost_meaning(INSIDE, str(key))
            if reason is not None:
                return str(key), reason
    return "", None


def is_empty(value: object) -> bool:
    """Return whether a value says nothing, so that a key with it need not be read."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_ignored(name: str, ignore: Collection[str]) -> bool:
    """Return whether a key is among those that are ignored, given by their names or as bare keys."""
    return name in ignore or any(name.endswith(f".{key}") for key in ignore)


def _name(level: str, key: object) -> str:
    """Return the name of a key of a level."""
    text = str(key) or "''"  # a table may have a column without a name
    return level + (text if len(text) <= 60 else text[:57] + "...")


def count(total: Counter[str], names: Iterable[str], by: int = 1) -> None:
    """Add names to a count, of which the number of distinct names stays bounded."""
    for name in names:
        total[name if name in total or len(total) < MAX_NAMES else OTHERS] += by


def add_counts(total: Counter[str], counts: Mapping[str, int]) -> None:
    """Add counts to a count, of which the number of distinct names stays bounded."""
    for name, number in counts.items():
        count(total, (name,), number)


def in_words(counts: Mapping[str, int], shown: int = 12, unit: str = "record") -> str:
    """Describe counts in a line, such as `label (300 records), tools (12)`; empty if there are none.

    Args:
        counts: Name -> count.
        shown: Largest number of names to state, the most frequent ones.
        unit: What is counted, in the singular.
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts: list[str] = []
    for name, number in ordered[:shown]:
        counted = ""
        if not parts:
            counted = f" {unit}" if number == 1 else f" {unit}s"
        parts.append(f"{name} ({number:,}{counted})")
    if len(ordered) > shown:
        parts.append(f"and {len(ordered) - shown:,} more")
    return ", ".join(parts)
