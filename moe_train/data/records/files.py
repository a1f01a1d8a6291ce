"""The records of one local file in any format that is read, in flat memory; the name of a file says its format.

What stands where a record should and is none comes as a `Problem` in its place, and reading goes on behind it where it
can. JSON is read here, line by line or element by element, so that an error names its line and no column changes its
type on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_train.data.records.file_bytes import COMPRESSIONS, is_compressed
from moe_train.data.records.json_array import is_array, read_array
from moe_train.data.records.json_lines import read_lines
from moe_train.data.records.plain_text import read_text
from moe_train.data.records.problem import Item, Problem
from moe_train.data.records.tables import read_csv, read_rows

FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip


def suffix(file: Path) -> str:
    """Lower case, without that of a compression."""
    return Path(file.stem).suffix.lower() if is_compressed(file) else file.suffix.lower()


def format_of(file: Path) -> str:
    """The format that goes with a name. Raises ValueError where none does."""
    kind = FORMATS.get(suffix(file))
    if kind is None:
        raise ValueError(
            f"{file}: no format goes with its name ({', '.join(FORMATS)}; json and text also as {', '.join(COMPRESSIONS)}); "
            "state format"
        )
    if is_compressed(file) and kind in ("parquet", "arrow"):
        raise ValueError(f"{file}: {kind} is compressed inside; unpack the file")
    return kind


def is_json_lines(file: Path, kind: str) -> bool:
    """Whether a file of format `kind` has a JSON object a line; looks into the file."""
    return kind == "json" and not is_array(file)


def read(
    file: Path,
    kind: str,
    by_line: bool,
    text_column: str,
    wanted: Sequence[str] | None = None,
    span: tuple[int, int | None, int] = (0, None, 1),
) -> Iterator[tuple[int, Item]]:
    """The records of a file of format `kind`, and the line (`by_line`: text and JSON lines) or else the row of each.

    text_column: what to call the text of a text file; wanted: the only columns to read of Parquet and Arrow; span: of
    JSON lines alone, as `json_lines.blocks` has it.
    """
    match kind:
        case "text":
            for line, text in read_text(file):
                yield line, text if isinstance(text, Problem) else {text_column: text}
        case "json" if by_line:
            yield from read_lines(file, *span)
        case "json":
            yield from read_array(file)
        case "csv":
            yield from read_csv(file)
        case _:
            yield from read_rows(file, kind, wanted)
