"""The files that a check reads: named on the command line or by a run's config, and how each is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from moe_train import config
from moe_train.data.records import files
from moe_train.data.records.file_bytes import is_compressed
from moe_train.data.records.local_files import expand_files
from moe_train.data.records.problem import Item


@dataclass(frozen=True)
class CheckedSource:
    """A group of files that are read in the same way."""

    files: tuple[str, ...]
    """Paths, folders or globs."""
    format: str = "auto"
    """The file format; "auto" to decide by the file name."""
    record: config.Record | None = None
    """How to read the records; None to recognize each by its columns."""
    ignore: tuple[str, ...] = ()
    """Keys that are not to be read, if records are recognized by their columns."""
    weight: float | None = None
    """The share of the files in a mixture; None if every row is seen once in an epoch."""
    without_licence: bool = False
    """Whether it is a source of a config, which has a place for the licence, and states none."""


class CheckedFile(NamedTuple):
    """A file to check."""

    file: Path
    kind: str
    """The format of the file."""
    source: int
    """Index of the source that the file belongs to."""
    counted: Literal["line", "row", "byte"]
    """The unit in which records are located: bytes if lines are sampled."""

    def location(self, number: int) -> str:
        """Return the location of a record, for messages."""
        if self.counted == "line":
            return f"{self.file}:{number}"
        return f"{self.file}: {self.counted} {number}"


def sources_of(chosen: Sequence[config.Source], ignore: Sequence[str] = ()) -> tuple[CheckedSource, ...]:
    """Return the sources of a run's config, to be read as training would read them.

    Args:
        chosen: The sources.
        ignore: Keys that are not to be read, besides those that the config names.

    Raises:
        ValueError: If a source does not consist of files.
    """
    sources = []
    for source in chosen:
        if not isinstance(source, config.FileSource):
            title, file_names = _not_files(source)
            raise ValueError(
                f"data: {title} is a {source.name} source, and not files of records, which are what is checked; "
                f"name files ({file_names}): moe-train data check FILES --tokenizer T"
            )
        record = _ignoring(source.record, ignore)
        without_licence = source.licence is None
        sources.append(CheckedSource(source.files, source.format, record, weight=source.weight, without_licence=without_licence))
    return tuple(sources)


def _ignoring(record: config.Record, ignore: Sequence[str]) -> config.Record:
    """Return a section that ignores more keys."""
    return record.model_copy(update={"ignore": tuple(dict.fromkeys((*record.ignore, *ignore)))})


def _not_files(source: config.HubSource | config.PythonSource | config.PreparedSource) -> tuple[str, str]:
    """Return what the source is called, and which files could be checked instead."""
    match source:
        case config.HubSource(dataset=dataset):
            return dataset, "its download"
        case config.PythonSource(title=title):
            return title, "its records as JSON lines"
        case config.PreparedSource(path=path):
            return path, "those that its manifest.json names"


def section_of(columns: Sequence[str], ignore: Sequence[str] = (), effort: str | None = None) -> config.Record | None:
    """Return the record section that FIELD=COLUMN pairs describe; None if there are no pairs.

    Args:
        columns: The pairs.
        ignore: Keys that are not to be read.
        effort: The reasoning effort of conversations that state none.

    Raises:
        ValueError: If they describe no kind of record, or two.
    """
    if not columns:
        return None
    # [::2] leaves the "=" out of (field, "=", column).
    pairs = dict(pair.partition("=")[::2] for pair in columns)
    ignored = tuple(ignore)
    if all(pairs.values()):  # a pair without "=", or with nothing after it, names no column
        match pairs:
            # A mapping pattern also matches a dict with more keys, hence `rest`.
            case {"text": column, **rest} if not rest:
                return config.TextRecord(name="text", column=column, ignore=ignored)
            case {"messages": column, **rest} if not rest:
                return config.ChatRecord(name="chat", column=column, ignore=ignored, reasoning_effort=effort)
            case {"prompt": prompt, "completion": completion, **rest} if not rest:
                return config.CompletionRecord(
                    name="completion", prompt=prompt, completion=completion, ignore=ignored, reasoning_effort=effort
                )
    raise ValueError(f"--map {' '.join(columns)} should be text=COLUMN, messages=COLUMN, or prompt=COLUMN and completion=COLUMN")


def places_of(sources: Sequence[CheckedSource], picked: bool) -> tuple[list[CheckedFile], list[Path]]:
    """Return the files of all sources.

    Args:
        sources: The sources.
        picked: Whether lines will be sampled, so that uncompressed JSON lines are located by byte.

    Returns:
        The files, and those of their folders that are in no known format.
    """
    places: list[CheckedFile] = []
    left_out: list[Path] = []
    for i, source in enumerate(sources):
        # Only the files and their format matter here, but a FileSource has to have some record section.
        record = source.record or config.TextRecord(name="text")
        section = config.FileSource.model_validate(
            {"name": "files", "files": source.files, "format": source.format, "record": record}
        )
        expanded = expand_files(section)
        left_out += expanded.left_out
        for file, kind in expanded.files:
            places.append(CheckedFile(file, kind, i, _unit(file, kind, picked)))
    return places, left_out


def _unit(file: Path, kind: str, picked: bool) -> Literal["line", "row", "byte"]:
    """Return the unit in which the records of a file are located."""
    is_json_lines = files.is_json_lines(file, kind)
    # A sample seeks to a byte, and would have to read the whole file to know the number of its line.
    if picked and is_json_lines and not is_compressed(file):
        return "byte"
    if is_json_lines or kind == "text":
        return "line"
    return "row"


def read_checked(place: CheckedFile, section: config.Record | None) -> Iterator[tuple[int, Item]]:
    """Yield the records of a file, one after the other."""
    text_column = "text"
    if isinstance(section, config.TextRecord):
        text_column = section.column
    return files.read_file(place.file, place.kind, place.counted == "line", text_column)
