"""Values of another trainer's config as the types that they should have; others are an error that names the key."""

from __future__ import annotations

from typing import Any

from moe_train.config.strict_yaml import shown


def as_number(key: str, value: Any) -> float:
    """Return a number; YAML 1.1 reads `1e-4` as text. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{key} has to be a number (value {shown(value)})")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{key} has to be a number (value {shown(value)})") from None


def as_text(key: str, value: Any) -> str:
    """Return a text. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{key} has to be a text (value {shown(value)})")
    return value


def as_mapping(key: str, value: Any) -> dict[str, Any]:
    """Return a mapping; null is an empty one. Raises ValueError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} has to be a mapping (value {shown(value)})")
    return {str(name): entry for name, entry in value.items()}


def as_mappings(key: str, value: Any) -> list[dict[str, Any]]:
    """Return a list of mappings; null is an empty one. Raises ValueError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} has to be a list (value {shown(value)})")
    return [as_mapping(f"{key}.{i}", entry) for i, entry in enumerate(value)]


def as_names(key: str, value: Any) -> list[str]:
    """Return a list of names that is stated as a list or as a text with commas. Raises ValueError for anything else."""
    if value is None:
        return []
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or any(isinstance(entry, dict | list) for entry in entries):
        raise ValueError(f"{key} has to be a list of names (value {shown(value)})")
    return [str(entry).strip() for entry in entries if entry is not None and str(entry).strip()]


def as_files(key: str, value: Any) -> list[str]:
    """Return paths that are stated as one text or as a list. Raises ValueError for anything else."""
    if isinstance(value, str):
        return [value.removeprefix("./")]
    return [name.removeprefix("./") for name in as_names(key, value)]
