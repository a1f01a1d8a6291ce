"""`moe-train explain`: what a key of a config means, and which recipes state it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_train.commands.recipes import values_of
from moe_train.config import Config, Suite
from moe_train.config.key_reference import KeyEntry, explain, keys
from moe_train.config.section import Section

KINDS: Mapping[str, type[Section]] = {"config": Config, "suite": Suite}
"""Name of a kind of file -> its section."""


def explain_key(key: str, kind: str) -> list[dict[str, Any]]:
    """Return one mapping for each meaning of a key, ready to be printed; kinds of a section may differ in it.

    Raises:
        ValueError: there is no such key; the message suggests the nearest.
    """
    return [_facts(entry, kind) for entry in explain(key, KINDS[kind])]


def list_keys(kind: str, below: str = "") -> list[dict[str, Any]]:
    """Return one row for each key below a section, with the first sentence of its description; "" for all keys."""
    rows = []
    for entry in keys(KINDS[kind]):
        if not below or entry.path.startswith((f"{below}.", f"{below}[]")):
            default = "required" if entry.default is None else entry.default
            sentence = entry.description.partition(". ")[0].rstrip(".")
            rows.append({"key": entry.path, "kinds": ", ".join(entry.kinds), "default": default, "meaning": sentence})
    return rows


def _facts(entry: KeyEntry, kind: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"key": entry.path}
    if entry.kinds:
        facts["of kinds"] = ", ".join(entry.kinds)
    facts["type"] = entry.type
    facts["default"] = "none; it must be stated" if entry.default is None else entry.default
    facts["meaning"] = entry.description
    if kind == "config":
        users = []
        for name, values in values_of(entry.path).items():
            if not isinstance(values[0], dict | list):
                users.append(f"{name} ({', '.join(json.dumps(value, ensure_ascii=False) for value in values)})")
        facts["stated by recipes"] = ", ".join(users) or "none"
    return facts
