"""Read the records of one local file in any supported format, in constant memory; the file name decides the format.

Something malformed in place of a record is returned as a `Problem`, and reading continues after it where possible. JSON is
parsed here, line by line or element by element, so that an error names its line and no column changes its type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moe_train.data.records import zip_archive
from moe_train.data.records.file_bytes import BOM, COMPRESSIONS, open_bytes
from moe_train.data.records.json_document import is_lines, read_document
from moe_train.data.records.json_lines import read_lines
from moe_train.data.records.plain_text import read_text
from moe_train.data.records.problem import Item, Problem
from moe_train.data.records.tables import Choice, read_csv, read_rows

FILE_FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text",
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
"""File name suffix -> format."""
_LONGEST_LINE = 1 << 20  # bytes of the first line of a text that are looked at


def suffix(file: Path) -> str:
    """Return the suffix of a file name in lower case, without the suffix of a compression."""
    if file.suffix.lower() in COMPRESSIONS:
        return Path(file.stem).suffix.lower()
    return file.suffix.lower()


def format_of(file: Path) -> str:
    """Return the format of a file by its name.

    Raises:
        ValueError: If no format has this suffix, or the format cannot be compressed from outside.
    """
    kind = FILE_FORMATS.get(suffix(file))
    if kind is None:
        raise ValueError(
            f"{file}: no format goes with its name ({', '.join(FILE_FORMATS)}; json, csv and text also as "
            f"{', '.join(COMPRESSIONS)}; any in a .zip); state it with --format (in a config: format)"
        )
    # Both compress their columns themselves, and are read out of order, which a compressed stream does not allow.
    if file.suffix.lower() in COMPRESSIONS and kind in ("parquet", "arrow"):
        raise ValueError(f"{file}: {kind} is compressed inside; unpack the file")
    return kind


def check_text(file: Path) -> None:
    """Raise ValueError if a file of texts begins with a line that is a JSON object, as JSON lines under a wrong name do."""
    try:
        with open_bytes(file) as stream:
            line = stream.readline(_LONGEST_LINE).removeprefix(BOM).strip()
    except Problem:
        return  # reading the records reports it, with a line number
    if not line.startswith(b"{"):
        return
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value:
        raise ValueError(
            f"{file}: its name is that of a text, and its first line is a JSON object; state --format json for JSON lines, or "
            "--format text for a text (in a config: format)"
        )


def is_json_lines(file: Path, kind: str) -> bool:
    """Return whether a file of format `kind` has one JSON object per line; opens the file."""
    return kind == "json" and is_lines(file)


def read_file(
    file: Path,
    kind: str,
    by_line: bool,
    text_column: str,
    wanted: Choice | None = None,
    span: tuple[int, int | None, int] = (0, None, 1),
) -> Iterator[tuple[int, Item]]:
    """Read the records of a file.

    Args:
        file: The file.
        kind: Its format.
        by_line: Whether records are numbered by line (text and JSON lines) or by row.
        text_column: The column name for the text of a text file.
        wanted: Returns the columns to read of those that a Parquet or Arrow file has; None for all.
        span: The part of a JSON lines file to read, as (start, stop, line) of `json_lines.blocks`.

    Yields:
        The number of the line or row, and the record or a Problem.
    """
    match kind:
        case "text":
            for line, text in read_text(file):
                yield line, text if isinstance(text, Problem) else {text_column: text}
        case "json" if by_line:
            yield from read_lines(file, *span)
        case "json":
            yield from read_document(file)
        case "csv" | "tsv":
            yield from read_csv(file, kind)
        case "zip":  # an archive that cannot be read, in place of its members
            damage = zip_archive.damage_of(file)
            if damage is not None:
                yield 1, damage
        case _:
            yield from read_rows(file, kind, wanted)
