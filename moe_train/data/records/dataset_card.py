"""The front matter of a data set's README.md, which says which files make up which split (`configs:` with `data_files:`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_train.data.records.file_bytes import open_bytes


class Part(NamedTuple):
    """A split of a data set as its card describes it."""

    name: str
    """The name of the split, after that of its config if the card has several."""
    patterns: tuple[str, ...]
    """Patterns of the paths of its files, relative to the card."""


def parts(card: Path) -> list[Part]:
    """Return the splits that a card describes; empty if it leaves that to the names of the files.

    Raises:
        ValueError: If the front matter cannot be read.
    """
    front_matter = _front_matter(card)
    # A card that names no files need not be valid YAML.
    if front_matter is None or "configs:" not in front_matter:
        return []
    try:
        content = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{card}: the front matter is not YAML ({reason}); correct it, or name the files") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, list):
        return []
    found: list[Part] = []
    for i, config in enumerate(configs):
        if not isinstance(config, dict):
            raise ValueError(f"{card}: config {i} should hold config_name and data_files; correct it, or name the files")
        # Configs of one card may use the same split names, so the name of the config keeps them apart.
        prefix = f"{config.get('config_name', i)}/" if len(configs) > 1 else ""
        for split, patterns in _splits(config, card):
            found.append(Part(prefix + split, patterns))
    return found


def matches(path: Path, pattern: str) -> bool:
    """Return whether a pattern names a relative path, or a folder that contains it; `**` is any number of folders."""
    wanted = [part for part in pattern.split("/") if part not in ("", ".")]
    # The second alternative takes a pattern without wildcards for a folder, with everything beneath it.
    return _matches(path.parts, wanted) or _matches(path.parts, [*wanted, "**"])


def _front_matter(card: Path) -> str | None:
    """Return the text between the first two lines `---`; None if the file does not begin with one."""
    with open_bytes(card) as stream:
        # Front matter stands at the start; a long card (tables, examples) is not read as a whole.
        text = stream.read(1 << 20).decode("utf-8-sig", "replace")
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    for i, line in enumerate(lines[1:], start=1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:i])
    return None


def _splits(config: dict[str, Any], card: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (split, patterns) for each split of a config."""
    folder = config.get("data_dir")
    prefix = f"{folder}/" if isinstance(folder, str) else ""
    data_files = config.get("data_files")
    if data_files is None:
        if prefix:
            yield "train", (f"{prefix}**",)
        return
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    plain = [entry for entry in entries if isinstance(entry, str)]
    if plain:
        yield "train", tuple(prefix + pattern for pattern in plain)
    for entry in entries:
        if isinstance(entry, str):
            continue
        patterns = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(patterns, str):
            patterns = [patterns]
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{card}: data_files should hold split and path, not {entry!r}; correct it, or name the files")
        yield str(entry.get("split", "train")), tuple(prefix + pattern for pattern in patterns)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
