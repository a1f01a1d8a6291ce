"""Records of local files, which never cause network traffic."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from moe_train import config
from moe_train.data.records import files
from moe_train.data.records.conversation import columns
from moe_train.data.records.file_bytes import is_compressed
from moe_train.data.records.problem import Item
from moe_train.data.records.scan import Scan, scan_file
from moe_train.data.records.source import OpenSource, Place, Span

_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""Files without records that `datasets` (save_to_disk) writes next to its Arrow files."""


class LocalFiles(OpenSource):
    """The files of a config section. Only uncompressed JSON lines can be cut into parts."""

    def __init__(self, source: config.FileSource) -> None:
        self._files = expand_files(source)
        self._columns = columns(source.record)
        json_lines = [files.is_json_lines(file, kind) for file, kind in self._files]
        self._cuttable = [lines and not is_compressed(file) for (file, _), lines in zip(self._files, json_lines, strict=True)]
        self.places = tuple(
            Place(str(file), kind, lines or kind == "text") for (file, kind), lines in zip(self._files, json_lines, strict=True)
        )

    def scan(self, memory: Path) -> list[Scan]:
        """Hash each file, and find where it can be cut."""
        return [scan_file(file, cuttable, memory) for (file, _), cuttable in zip(self._files, self._cuttable, strict=True)]

    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """Yield the records of a part of a file."""
        by_line = self.places[span.place].by_line
        return files.read_file(*self._files[span.place], by_line, self._columns[0], self._columns, span[1:])


def expand_files(source: config.FileSource) -> list[tuple[Path, str]]:
    """Expand the patterns of a section to files with their formats.

    Args:
        source: The section.

    Returns:
        Each file once, in the order of the patterns, and sorted within a pattern.

    Raises:
        FileNotFoundError: If a pattern matches nothing.
        ValueError: If a file is named twice or has no known format, a pattern is a URL, or a text file is to hold conversations.
    """
    formats: dict[Path, str] = {}
    for pattern in source.files:
        if "://" in pattern:
            raise ValueError(
                f"data: {pattern} is a URL; records are read from this machine's file systems only: copy or mount them, or run "
                "`moe-train data prepare CONFIG --to URL` where they are, and train from {name: prepared, path: URL/tokens-…}"
            )
        matching = _matching(pattern, source.format)
        if not matching:
            raise FileNotFoundError(f"data: no file matches {pattern} (looked in {Path.cwd()})")
        for file in matching:
            if file in formats:
                raise ValueError(f"data: {file} is named twice in files; name it once (weight sets how often it is seen)")
            if source.format == "auto":
                formats[file] = files.format_of(file)
            else:
                formats[file] = source.format
    if isinstance(source.record, config.ChatRecord | config.CompletionRecord):
        for file, kind in formats.items():
            if kind == "text":
                raise ValueError(f"{file} is plain text, which has no {source.record.name} records; use record: {{name: text}}")
    return list(formats.items())


def _matching(pattern: str, file_format: str) -> list[Path]:
    """Return the files that a path, a folder or a glob names; from a folder, only files of known formats unless one is stated."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        folder_files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _left_out(file.relative_to(path))]
        return [file for file in folder_files if file_format != "auto" or files.suffix(file) in files.FILE_FORMATS]
    if path.is_file():
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]


def _left_out(path: Path) -> bool:
    """Return whether a file in a folder is hidden or a bookkeeping file."""
    return path.name in _BOOKKEEPING or any(part.startswith(".") for part in path.parts)
