"""Which files of a folder hold records, by what the folder says of itself.

- `dataset_dict.json` (from `datasets`, save_to_disk of several splits): the files of its only split; several need a choice.
- `state.json` (save_to_disk of one split): the Arrow files that it names.
- `README.md` with `configs:` (a data set's card): the files of its only split; several need a choice.
- Otherwise: all files of known formats. Several splits, told by the names of the files, need a choice.

An archive (.zip) is read as a folder. Left out are hidden files, caches of `datasets`, and files about the data: README, LICENSE,
CHANGELOG and the like, and dataset_infos.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from moe_train.data.records import dataset_card, zip_archive
from moe_train.data.records.file_bytes import open_bytes
from moe_train.data.records.problem import Problem
from moe_train.data.records.splits import check_one_split, several_splits

_DESCRIPTIONS = ("dataset_dict.json", "state.json", "README.md")
_ABOUT = {
    *("readme", "license", "licence", "licenses", "copying", "notice", "changelog", "changes", "contributing"),
    *("code_of_conduct", "citation", "authors", "security"),
}
_ABOUT_SUFFIXES = ("", ".md", ".txt", ".rst")
_BOOKKEEPING = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}


class FolderFiles(NamedTuple):
    """The files of a folder or an archive."""

    files: list[Path]
    """Files that hold records, sorted; an archive that cannot be read is among them."""
    left_out: list[Path]
    """Files of other formats, which may hold records all the same."""


def files_of(root: Path, suffixes: Iterable[str] | None) -> FolderFiles:
    """Return the files of a folder, or of an archive or a folder in it.

    Args:
        root: The folder or archive.
        suffixes: The endings of the names of files that hold records; None for all files.

    Raises:
        ValueError: If the folder has several splits, or its description cannot be used.
    """
    all_files = listed(root)
    described = _described_folders(all_files)
    # The folder itself says which files are its data; files beside those that it names are left out.
    if root in described:
        return FolderFiles(described[root], [])
    claimed = set(described)
    # A described folder beneath the root contributes exactly the files of its description, added below.
    files = [file for file in all_files if not claimed.intersection(file.parents) and is_data(file)]
    left_out: list[Path] = []
    if suffixes is not None:
        known = (*suffixes, zip_archive.SUFFIX)
        left_out = [file for file in files if not file.name.lower().endswith(known)]
        files = [file for file in files if file.name.lower().endswith(known)]
    for folder_files in described.values():
        files += folder_files
    files.sort()
    check_one_split(files, root)
    return FolderFiles(files, left_out)


def is_data(file: PurePath) -> bool:
    """Return whether a file may hold records by its name, and is not about the data or a cache of `datasets`."""
    name = file.name.lower()
    if name in _BOOKKEEPING or (name.startswith("cache-") and file.suffix == ".arrow"):
        return False
    return not (file.suffix.lower() in _ABOUT_SUFFIXES and file.stem.lower() in _ABOUT)


def listed(root: Path) -> list[Path]:
    """Return all files beneath a folder or archive, except hidden ones; sorted.

    Archives are replaced by their members, except those that cannot be read.
    """
    if zip_archive.is_archive(root):
        found = _opened(root)
    elif (archive := zip_archive.archive_of(root)) is not None:
        found = [file for file in zip_archive.members(archive) if root in file.parents]
    else:
        found = []
        for file in sorted(root.rglob("*")):
            if zip_archive.is_archive(file) and not _is_hidden(file.relative_to(root)):
                found += _opened(file)
            elif file.is_file():
                found.append(file)
    return [file for file in found if not _is_hidden(file.relative_to(root))]


def _opened(archive: Path) -> list[Path]:
    """Return the members of an archive, or the archive itself if it cannot be read."""
    return [archive] if zip_archive.damage_of(archive) else zip_archive.members(archive)


def _is_hidden(path: PurePath) -> bool:
    """Return whether a relative path is hidden, or is macOS's copy of attributes in an archive."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _described_folders(all_files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the data files of each folder that describes itself; folders in such a folder belong to it."""
    describing = {file.parent for file in all_files if file.name in _DESCRIPTIONS}
    described: dict[Path, list[Path]] = {}
    # From the outside in: a saved DatasetDict has a state.json in the folder of each split, which belongs to it.
    for folder in sorted(describing, key=lambda folder: (len(folder.parts), folder)):
        if described.keys() & set(folder.parents):
            continue
        files = _described(folder, all_files)
        if files is not None:
            described[folder] = files
    return described


def _described(folder: Path, all_files: Sequence[Path]) -> list[Path] | None:
    """Return the data files of a folder by its description; None if it has none that names files."""
    beneath = {file for file in all_files if folder in file.parents}
    if folder / "dataset_dict.json" in beneath:
        return _of_dict(folder, all_files)
    # state.json and README.md are common names, so either may turn out to say nothing about data files.
    if folder / "state.json" in beneath:
        files = _of_state(folder, beneath)
        if files is not None:
            return files
    if folder / "README.md" in beneath:
        return _of_card(folder, beneath)
    return None


def _of_dict(folder: Path, all_files: Sequence[Path]) -> list[Path]:
    """Return the files of the only split of a saved `DatasetDict`."""
    file = folder / "dataset_dict.json"
    content = _read(file)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits or not all(_is_name(split) for split in splits):
        raise ValueError(f"{file}: it should name splits, as datasets writes it; save the data set again, or name its files")
    if len(splits) > 1:
        choices = " or ".join(str(folder / split) for split in splits)
        raise ValueError(f"{folder} has the splits {', '.join(splits)}, which are not mixed; name the folder of one: {choices}")
    files = _described(folder / splits[0], all_files)
    if files is None:
        raise ValueError(f"{folder / splits[0]} has no state.json, which names its files; save the data set again")
    return files


def _of_state(folder: Path, beneath: set[Path]) -> list[Path] | None:
    """Return the Arrow files of a saved `Dataset`; None if state.json is not about one."""
    file = folder / "state.json"
    content = _read(file)
    entries = content.get("_data_files") if isinstance(content, dict) else None
    if entries is None:
        return None
    names: list[Any] = [None]
    if isinstance(entries, list):
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not _is_name(name):
            raise ValueError(f"{file}: _data_files should name files of the folder; save the data set again, or name its files")
        if folder / name not in beneath:
            raise ValueError(f"{file}: the file {name}, which it names, is not there; copy the whole folder, or name its files")
    return [folder / name for name in names]


def _of_card(folder: Path, beneath: set[Path]) -> list[Path] | None:
    """Return the files of the only split that a data set's card describes; None if the card names no files."""
    parts = dataset_card.parts(folder / "README.md")
    groups: dict[str, list[Path]] = {}
    for name, patterns in parts:
        matching = [
            file
            for file in sorted(beneath)
            if is_data(file) and any(dataset_card.matches(file.relative_to(folder), pattern) for pattern in patterns)
        ]
        if not matching:
            raise ValueError(
                f"{folder / 'README.md'}: the split {name} has the files {', '.join(patterns)}, and none of them is there; "
                "fetch the whole data set, or name files"
            )
        groups[name] = matching
    if len(groups) > 1:
        raise several_splits(folder, groups, beneath)
    return next(iter(groups.values()), None)


def _read(file: Path) -> Any:
    """Return the content of a JSON file of `datasets`."""
    try:
        with open_bytes(file) as stream:
            return json.loads(stream.read())
    except (Problem, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); save the data set again, or name its files") from error


def _is_name(value: Any) -> bool:
    """Return whether a value is the name of a file or folder, without a path."""
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value
