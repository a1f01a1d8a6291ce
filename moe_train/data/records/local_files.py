"""Records of local files, which never cause network traffic."""

from __future__ import annotations

import functools
import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.data.records import dataset_card, files, folders, zip_archive
from moe_train.data.records.conversation import columns_to_load, read_columns, text_column
from moe_train.data.records.file_bytes import COMPRESSIONS, is_compressed
from moe_train.data.records.problem import Item, located, usable
from moe_train.data.records.scan import Scan, scan_file
from moe_train.data.records.source import OpenSource, Place, Span
from moe_train.data.records.splits import check_one_split
from moe_train.data.records.unread import in_words


class LocalFiles(OpenSource):
    """The files of a config section. Only uncompressed JSON lines can be cut into parts."""

    def __init__(self, source: config.FileSource) -> None:
        self._files, self.left_out = expand_files(source)
        for file, _ in self._files:
            damage = zip_archive.damage_of(file) if zip_archive.is_archive(file) else None
            if damage is not None:
                raise ValueError(f"{file}: {damage}") from damage
        self._record = source.record
        self._read_columns = read_columns(source.record)
        json_lines = [files.is_json_lines(file, kind) for file, kind in self._files]
        # A compressed stream cannot be entered in the middle.
        self._cuttable = [lines and not is_compressed(file) for (file, _), lines in zip(self._files, json_lines, strict=True)]
        self.places = tuple(
            Place(str(file), kind, lines or kind == "text") for (file, kind), lines in zip(self._files, json_lines, strict=True)
        )

    def scan(self, memory: Path) -> list[Scan]:
        """Hash each file, and find where it can be cut."""
        return [scan_file(file, cuttable, memory) for (file, _), cuttable in zip(self._files, self._cuttable, strict=True)]

    def folder(self, place: int) -> Path | None:
        """Return the folder of a file; None for a file in an archive."""
        return picture_folder(self._files[place][0])

    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """Yield the records of a part of a file."""
        by_line = self.places[span.place].by_line
        file, kind = self._files[span.place]
        wanted = functools.partial(columns_to_load, self._record)
        records = files.read_file(file, kind, by_line, text_column(self._record), wanted, span[1:])
        # Only typed columns can hold values that JSON lacks; a Problem in a column that nothing reads does no harm.
        if kind not in ("parquet", "arrow"):
            return records
        return ((number, usable(record, self._read_columns)) for number, record in records)


def picture_folder(file: Path) -> Path | None:
    """Return the folder that paths of pictures in a file of records are relative to; None for a file in an archive."""
    return None if zip_archive.archive_of(file) is not None else file.parent


class ExpandedFiles(NamedTuple):
    """The files of a section."""

    files: list[tuple[Path, str]]
    """Each file once with its format, in the order of the patterns, and sorted within a pattern."""
    left_out: list[Path]
    """Files of the folders and archives that are in no known format, which are not read."""


def expand_files(source: config.FileSource) -> ExpandedFiles:
    """Expand the patterns of a section to files with their formats.

    An archive that cannot be read is a file of the format zip, of which `read_file` gives the problem.

    Args:
        source: The section.

    Raises:
        FileNotFoundError: If a pattern matches nothing.
        ValueError: If a file is named twice or has no known format, a folder or glob has several splits, a pattern is a URL, or a
            text file is to hold conversations, or holds JSON lines.
    """
    formats: dict[Path, str] = {}
    left_out: list[Path] = []
    for pattern in source.files:
        if "://" in pattern:
            raise ValueError(
                f"data: {pattern} is a URL; records are read from this machine's file systems only: copy or mount them, or run "
                "`moe-train data prepare CONFIG --to URL` where they are, and train from {name: prepared, path: URL/tokens-…}"
            )
        matching = _matching(pattern, source.format)
        left_out += matching.left_out
        if not matching.files and matching.left_out:
            raise FileNotFoundError(f"data: {pattern} has no file of a known format, only {suffixes_in_words(left_out)}")
        if not matching.files:
            reason = f"{pattern} holds no file" if Path(pattern).exists() else f"no file matches {pattern}"
            raise FileNotFoundError(f"data: {reason} (looked in {Path.cwd()})")
        for file in matching.files:
            if file in formats:
                raise ValueError(f"data: {file} is named twice in files; name it once (weight sets how often it is seen)")
            if zip_archive.is_archive(file):
                formats[file] = "zip"
            elif source.format == "auto":
                formats[file] = files.format_of(file)
                if formats[file] == "text":
                    files.check_text(file)
            else:
                formats[file] = source.format
    if isinstance(source.record, config.ChatRecord | config.CompletionRecord):
        for file, kind in formats.items():
            if kind == "text":
                raise ValueError(f"{file} is plain text, which has no {source.record.name} records; use record: {{name: text}}")
    return ExpandedFiles(list(formats.items()), left_out)


def suffixes_in_words(paths: Sequence[Path]) -> str:
    """Describe files by the endings of their names, such as `.png (12 files), .pdf (1)`."""
    return in_words(Counter(path.suffix.lower() or path.name for path in paths), unit="file")


def _matching(pattern: str, file_format: str) -> folders.FolderFiles:
    """Return the files that a path, a folder, an archive, a path in an archive, or a glob of any of these names.

    From folders and archives, only files of known formats are taken unless a format is stated.
    """
    path = Path(pattern).expanduser()
    suffixes = None
    if file_format == "auto":
        # With a stated format the names of the files mean nothing, so all files of a folder are taken.
        suffixes = [*files.FILE_FORMATS, *(kind + packed for kind in files.FILE_FORMATS for packed in COMPRESSIONS)]
    if path.is_dir() or zip_archive.is_archive(path):
        return folders.files_of(path, suffixes)
    if path.is_file():
        return folders.FolderFiles([path], [])
    archive = zip_archive.archive_of(path)
    if archive is not None:
        candidates = located(str(archive), zip_archive.members, archive)
        if path in candidates:
            return folders.FolderFiles([path], [])
        if any(path in member.parents for member in candidates):
            return folders.files_of(path, suffixes)
        inner = path.relative_to(archive).as_posix()
        matches = [member for member in candidates if dataset_card.matches(member.relative_to(archive), inner)]
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    found: list[Path] = []
    left_out: list[Path] = []
    for match in matches:
        # `**` matches folders and the files in them; opening the folders as well would name each file twice.
        if zip_archive.is_archive(match) or (match.is_dir() and "**" not in pattern):
            of_match = folders.files_of(match, suffixes)
            found += of_match.files
            left_out += of_match.left_out
        # A wildcard is not meant for README.md and the like; a name that is written out is.
        elif not match.is_dir() and (folders.is_data(match) or not glob.has_magic(path.name)):
            # Records are read more than once: to hash them, to find where they can be cut, and to train.
            if match.exists() and not match.is_file():
                raise ValueError(f"{match}: a pipe or a device can be read only once; write its records to a file")
            found.append(match)
    check_one_split(found, _fixed_folder(path))
    return folders.FolderFiles(found, left_out)


def _fixed_folder(pattern: Path) -> Path:
    """Return the deepest folder of a glob that has no wildcard in its name."""
    folder = pattern.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder
