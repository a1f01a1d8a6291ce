"""Tell from the names of files which split of a data set they belong to, so that test data are never trained on by accident."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in names of files and folders -> the split that they stand for, as in the `datasets` library."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # the file names that the hub gives to the parts of a split, in the folder data/
_DOCUMENTS = (".txt", ".md", ".rst")


def check_one_split(files: Sequence[Path], root: Path) -> None:
    """Refuse files of several splits.

    Args:
        files: The files.
        root: The folder that was named; the names of folders above it say nothing.

    Raises:
        ValueError: If the files belong to different splits; it names them.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        # A file that names no split counts as training data, so that a test file beside it is still noticed.
        groups.setdefault(split_of(file.relative_to(root)) or "train", []).append(file)
    if len(groups) > 1:
        raise several_splits(root, groups, files)


def several_splits(root: Path, groups: dict[str, list[Path]], files: Iterable[Path]) -> ValueError:
    """Return the error for a folder with several splits, which names each with a pattern for its files.

    Args:
        root: The folder.
        groups: The files of each split.
        files: All files that a pattern must tell apart.
    """
    names = ", ".join(list(groups)[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
    patterns = [_pattern(group, files) for group in list(groups.values())[:6]]
    return ValueError(f"{root} has the splits {names}, which are not mixed; name the files of one: {' or '.join(patterns)}")


def split_of(path: PurePath) -> str | None:
    """Return the split that the names in a relative path state; None if they state none.

    The file name counts before its folders. The name of a document counts only if it is nothing but a split's name.
    """
    is_document = path.suffix.lower() in _DOCUMENTS
    stem = path.name.split(".")[0] if is_document else path.name.rsplit(".", 1)[0]
    shard = _SHARD.fullmatch(stem)
    # The hub's split names are free, so one that is not in the table stands for itself.
    if shard and path.parent.name == "data":
        return _SPLITS.get(shard[1].lower(), shard[1])
    for i, name in enumerate([stem, *reversed(path.parent.parts)]):
        # Whole words only, so that "latest" or "contest" is not taken for test.
        words = re.split(r"[^a-z]+", name.lower())
        named = [_SPLITS[word] for word in words if word in _SPLITS]
        is_whole = len([word for word in words if word]) == 1
        if named and (is_whole or not is_document or i):
            return named[-1]
    return None


def _pattern(group: Sequence[Path], files: Iterable[Path]) -> str:
    """Return a pattern that matches the files of a group, and none of the others if that can be said in one pattern."""
    if len(group) == 1:
        return str(group[0])
    others = [file for file in files if file not in set(group)]
    folder = _common_folder(group)
    if not any(folder in other.parents for other in others):
        return str(folder)
    if all(file.parent == folder for file in group):
        names = [file.name for file in group]
        start = _common_start(names)
        end = _common_start([name[len(start) :][::-1] for name in names])[::-1]
        pattern = f"{glob.escape(str(folder / start) if start else f'{folder}/')}*{glob.escape(end)}"
        if not any(other.parent == folder and fnmatchcase(str(other), pattern) for other in others):
            return pattern
    shown = ", ".join(str(file) for file in group[:3])
    return shown if len(group) <= 3 else f"{shown}, … ({len(group)} files)"


def _common_folder(files: Sequence[Path]) -> Path:
    """Return the deepest folder that contains all files."""
    folder = files[0].parent
    while not all(folder in file.parents for file in files):
        folder = folder.parent
    return folder


def _common_start(names: Sequence[str]) -> str:
    """Return the longest text with which all names begin."""
    # The first and the last in alphabetical order differ the earliest, so the others need not be compared.
    shortest = min(names)
    longest = max(names)
    length = 0
    while length < min(len(shortest), len(longest)) and shortest[length] == longest[length]:
        length += 1
    return shortest[:length]
