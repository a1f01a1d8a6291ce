"""Read the records of tables: the rows of CSV, TSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_train.data.records.file_bytes import (
    CUT_SHORT,
    MAX_RECORD,
    looks_like_utf16,
    not_utf8_on_line,
    on_disk,
    open_bytes,
    utf16,
)
from moe_train.data.records.problem import Item, Problem, brief
from moe_train.data.records.unread import NOT_LOADED, NotLoaded

Choice = Callable[[Sequence[str]], list[str]]
"""A function that returns those of a table's columns that are to be read."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what decoding with surrogateescape makes of such bytes
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_OTHER_DELIMITER = re.compile(r"[;\t|]")


def read_csv(file: Path, kind: str = "csv") -> Iterator[tuple[int, Item]]:
    """Yield the rows of a table of text with a header, counted from 1.

    Every value is text, or None if it is empty: such a table cannot tell an empty text from a value that is missing.

    Args:
        file: The file.
        kind: "csv" or "tsv", which has tabs in place of commas.
    """
    number = 0
    # Python's default limit of 128 KiB is less than many conversations take.
    csv.field_size_limit(MAX_RECORD)
    try:
        # newline="" leaves line ends inside quoted fields alone, as the csv module demands. Bytes that are not UTF-8 are kept as
        # halves of surrogate pairs, so that only their row is refused.
        with open_bytes(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
            rows = csv.reader(text, strict=True, delimiter=_DELIMITERS[kind])
            header = _header(next(_rows_of_text(rows, kind), []))
            if isinstance(header, Problem):
                yield 0, header
                return
            for row in _rows_of_text(rows, kind):
                number += 1
                if isinstance(row, Problem):
                    yield number, row
                elif len(row) == len(header):
                    values = [value if value else None for value in row]
                    yield number, dict(zip(header, values, strict=True))
                else:
                    message = f"line {rows.line_num} has {len(row)} values for {len(header)} columns"
                    delimiter = "tabs" if kind == "tsv" else "commas"
                    yield number, Problem("unreadable", message, f"put text with {delimiter} in it into quotes")
    except Problem as problem:
        yield number + 1, problem


def _rows_of_text(rows: Any, kind: str) -> Iterator[list[str] | Problem]:
    """Yield the values of each row, or the Problem with it, from a reader of the csv module; blank lines are no rows."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader goes on with the next line.
            message = f"line {rows.line_num} is no {kind.upper()}: {error}"
            yield Problem("unreadable", message, "double the quotes inside of quotes")
            continue
        text = "".join(row)
        escaped = None if text.isascii() else _NOT_UTF8.search(text)
        if escaped is not None:
            data = text.encode("utf-8", "surrogateescape")
            yield utf16() if looks_like_utf16(data) else not_utf8_on_line(ord(escaped[0]) & 0xFF, rows.line_num)
        elif row:
            yield row


def _header(names: list[str] | Problem) -> list[str] | Problem:
    """Return the names of the columns, given the first row; or the Problem with them."""
    if isinstance(names, Problem):
        return names
    if len(set(names)) < len(names):
        return Problem("unreadable", f"the header names a column twice: {brief(names)}", "give each its own name")
    if names and names[0].lstrip().startswith(("{", "[")):
        return Problem(
            "unreadable", f"the header is no list of names: {brief(','.join(names))}", "state --format json for JSON lines"
        )
    if len(names) == 1 and (delimiter := _OTHER_DELIMITER.search(names[0])):
        message = f"the header is one column, {brief(names[0])}, and seems to be separated by {brief(delimiter[0])}"
        remedy = "save the table with commas; one with tabs is read with --format tsv (in a config: format)"
        return Problem("unreadable", message, remedy)
    text = "".join(names)
    return utf16() if text and looks_like_utf16(text.encode()) else names


def read_rows(file: Path, kind: str, wanted: Choice | None) -> Iterator[tuple[int, Item]]:
    """Yield the rows of a Parquet or Arrow file, counted from 1, with values as `column_values.rows` converts them.

    Args:
        file: The file.
        kind: "parquet" or "arrow".
        wanted: Returns the columns to read; None for all. The values of the others are `NOT_LOADED`.
    """
    import pyarrow

    from moe_train.data.records import column_values

    number = 1
    try:
        with on_disk(file) as path:
            for batch, left_out in _batches(path, kind, wanted):
                for row in column_values.rows(batch):
                    yield number, row | left_out
                    number += 1
    except Problem as problem:
        yield number, problem
    # A damaged file raises any of these from inside pyarrow.
    except (OSError, ValueError, ArithmeticError, LookupError, pyarrow.ArrowException, NotImplementedError) as error:
        # These say nothing about the content of the file.
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield number, Problem("unreadable", f"cannot be read as {kind} ({reason})", CUT_SHORT)


def _batches(file: Path, kind: str, wanted: Choice | None) -> Iterator[tuple[Any, dict[str, NotLoaded]]]:
    """Yield record batches of up to 1024 rows, with the wanted columns, and the names of the other columns."""
    import pyarrow

    rows = 1024
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            _check_names(table.schema_arrow.names)
            names = None
            if wanted is not None:
                names = wanted(table.schema_arrow.names)
            if names == [] and table.metadata.num_rows:  # read all columns, so that the error of the record can name them
                names = table.schema_arrow.names
            for batch in table.iter_batches(rows, columns=names):
                yield batch, _left_out(table.schema_arrow.names, names)
        return
    with pyarrow.memory_map(str(file)) as source:
        # An Arrow file has a footer with the places of its batches; `datasets` writes streams, which have none.
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        _check_names(reader.schema.names)
        names = (None if wanted is None else wanted(reader.schema.names)) or reader.schema.names
        for batch in batches:
            batch.validate(full=True)  # in a damaged file offsets may point outside the data
            batch = batch.select(names)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows), _left_out(reader.schema.names, names)


def _left_out(present: list[str], names: list[str] | None) -> dict[str, NotLoaded]:
    """Return the columns that are not among the names to load, each with `NOT_LOADED`."""
    return {} if names is None else {name: NOT_LOADED for name in present if name not in names}


def _check_names(names: Sequence[str]) -> None:
    """Raise Problem if two columns have the same name."""
    if len(set(names)) < len(names):
        raise Problem("unreadable", f"the table names a column twice: {brief(list(names))}", "give each its own name")
