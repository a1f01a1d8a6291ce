"""Records with their origin, from local files or the hub, in a fixed order.

Local files are read by `files` and never cause network traffic; the hub is read by the `datasets` library.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.records import files
from moe_train.data.records.conversation import columns
from moe_train.data.records.file_bytes import is_compressed
from moe_train.data.records.problem import Item, Problem, located, text_field

# What `datasets` writes beside its Arrow files (save_to_disk), and is no data.
_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}


class Origin(NamedTuple):
    """Where a record stands: which place of its `Records`, and which line (JSON lines) or row, counted from 1."""

    place: int
    number: int


class Span(NamedTuple):
    """Records of a place that stand together: bytes `start` to `stop` (None: the end), where line `line` begins.

    Only JSON lines that are not compressed can be read from anywhere but their start.
    """

    place: int
    start: int = 0
    stop: int | None = None
    line: int = 1


@dataclass(frozen=True)
class Records:
    """The records of one source; iterating reads them anew, always in the same order.

    places: names for error messages; files: local places, with their formats in `kinds`; cuttable: whether any `Span` of
    it can be read; pinned: what fixes the content where it is not in local files; examine: (number, record) of a span, or
    (number, Problem) where there is none.
    """

    places: tuple[str, ...]
    by_line: tuple[bool, ...]
    examine: Callable[[Span], Iterator[tuple[int, Item]]]
    files: tuple[Path, ...] = ()
    kinds: tuple[str, ...] = ()
    cuttable: tuple[bool, ...] = ()
    pinned: str | None = None

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the content (for the hub: of name and commit), wherever it lies. Reads all files."""
        content = hashlib.sha256((self.pinned or "").encode())
        for file, kind in zip(self.files, self.kinds, strict=True):
            with file.open("rb") as stream:
                content.update(kind.encode() + hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()

    def read(self, span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records of a span. Raises ValueError with file and line (or row) for the first that is malformed."""
        for number, record in self.examine(span):
            if isinstance(record, Problem):
                raise ValueError(f"{self.where(Origin(span.place, number))}: {record}") from record
            yield number, record

    def __iter__(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        for place in range(len(self.places)):
            for number, record in self.read(Span(place)):
                yield Origin(place, number), record

    def where(self, origin: Origin) -> str:
        """`path:line`, or `path: row N`."""
        separator = ":" if self.by_line[origin.place] else ": row "
        return f"{self.places[origin.place]}{separator}{origin.number}"


def open_source(source: config.RecordSource) -> Records:
    """The records of a config section.

    Raises FileNotFoundError for a path that matches nothing, ValueError for a format that is not known. Reading raises
    ValueError with file and line (or row) for what is malformed.
    """
    match source:
        case config.FileSource():
            return _open_files(source)
        case config.HubSource():
            return _open_hub(source)


def texts(source: config.RecordSource) -> Iterator[str]:
    """The text of every text record of a source, as for training a tokenizer."""
    if not isinstance(source.record, config.TextRecord):
        raise ValueError(f"plain text is needed, not {source.record.name} records; use record: {{name: text}}")
    records = open_source(source)
    for origin, fields in records:
        yield located(records.where(origin), text_field, fields, source.record.column)


# --- local files -----------------------------------------------------------------------------------------------


def _open_files(source: config.FileSource) -> Records:
    found = resolve(source)
    wanted = columns(source.record)

    def examine(span: Span) -> Iterator[tuple[int, Item]]:
        return files.read(*found[span.place], by_line[span.place], wanted[0], wanted, span[1:])

    json_lines = [files.is_json_lines(file, kind) for file, kind in found]
    by_line = tuple(lines or kind == "text" for (_, kind), lines in zip(found, json_lines, strict=True))
    return Records(
        places=tuple(str(file) for file, _ in found),
        by_line=by_line,
        examine=examine,
        files=tuple(file for file, _ in found),
        kinds=tuple(kind for _, kind in found),
        cuttable=tuple(lines and not is_compressed(file) for (file, _), lines in zip(found, json_lines, strict=True)),
    )


def resolve(source: config.FileSource) -> list[tuple[Path, str]]:
    """Each file once, with its format, in the order of the patterns and sorted within one.

    Raises FileNotFoundError for a pattern that matches nothing, ValueError for a file named twice or of no known format.
    """
    found: dict[Path, str] = {}
    for pattern in source.files:
        if "://" in pattern:
            raise ValueError(
                f"data: {pattern} is a URL; records are read from this machine's file systems only: copy or mount them, or run "
                "`moe-train data prepare CONFIG --to URL` where they are, and train from {name: prepared, path: URL/tokens-…}"
            )
        path = Path(pattern).expanduser()
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _left_out(file.relative_to(path))]
            matching = [file for file in inside if source.format != "auto" or files.suffix(file) in files.FORMATS]
        elif path.is_file():
            matching = [path]
        else:
            matching = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not matching:
            raise FileNotFoundError(f"data: no file matches {pattern} (looked in {Path.cwd()})")
        for file in matching:
            if file in found:
                raise ValueError(f"data: {file} is named twice in files; name it once (weight sets how often it is seen)")
            found[file] = files.format_of(file) if source.format == "auto" else source.format
    if isinstance(source.record, config.ChatRecord | config.CompletionRecord):
        for file, kind in found.items():
            if kind == "text":
                raise ValueError(f"{file} is plain text, which has no {source.record.name} records; use record: {{name: text}}")
    return list(found.items())


def _left_out(path: Path) -> bool:
    return path.name in _BOOKKEEPING or any(part.startswith(".") for part in path.parts)


# --- the hub ---------------------------------------------------------------------------------------------------


def _open_hub(source: config.HubSource) -> Records:
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        raise ValueError(f"data: revision {source.revision} of {source.dataset} can move; state the commit (40 hex digits)")
    name = "/".join(filter(None, (f"hub:{source.dataset}@{source.revision}", source.subset, source.split)))

    def examine(_: Span) -> Iterator[tuple[int, Item]]:
        import datasets

        try:
            rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision)
        except (OSError, ValueError) as error:  # the library's own errors are of these kinds
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{name} cannot be had ({reason}); fetch it where there is a network, or use files") from error
        present = [column for column in rows.column_names if column in columns(source.record)]
        for number, row in enumerate(rows.select_columns(present) if present else rows, start=1):
            yield number, dict(row)

    return Records(places=(name,), by_line=(False,), examine=examine, pinned=name)
