"""The records of one local file: JSON lines, a JSON array, CSV, Parquet, Arrow or text, compressed or not, in flat memory.

What stands where a record should and is none comes as a `Problem` in its place, and reading goes on behind it where it
can. JSON is read here, line by line or element by element, so that an error names its line and no column changes its
type on the way.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.data.fields import Problem, brief

Item = dict[str, Any] | Problem

FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

BLOCK = 1 << 20
MAX_RECORD = 64 << 20  # bytes of JSON; a longer one is passed over without being held
MAX_TEXT = 4 << 20  # bytes of a text file in one record; a longer file becomes several
MAX_DEPTH = 100
_CUT_SHORT = "is it cut short? fetch or write it again"
_BOM = codecs.BOM_UTF8


def suffix(file: Path) -> str:
    """Lower case, without that of a compression."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in COMPRESSIONS else file.suffix.lower()


def format_of(file: Path) -> str:
    """The format that goes with a name. Raises ValueError where none does."""
    kind = FORMATS.get(suffix(file))
    compressed = file.suffix.lower() in COMPRESSIONS
    if kind is None:
        raise ValueError(
            f"{file}: no format goes with its name ({', '.join(FORMATS)}; json and text also as {', '.join(COMPRESSIONS)}); "
            "state format"
        )
    if compressed and kind in ("parquet", "arrow"):
        raise ValueError(f"{file}: {kind} is compressed inside; unpack the file")
    return kind


class Block(NamedTuple):
    """Whole lines, of which the first is number `line`; or what is wrong with that line."""

    line: int
    lines: bytes | Problem


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked. Errors of the unpacking are raised as Problem."""
    try:
        with _stream(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if file.suffix.lower() not in COMPRESSIONS or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise Problem("unreadable", f"cannot be unpacked to its end ({error})", _CUT_SHORT) from error


def _stream(file: Path) -> Any:
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file)
        case ".bz2":
            return bz2.open(file)
        case ".xz":
            return lzma.open(file)
        case ".zst":
            import pyarrow

            return pyarrow.input_stream(str(file), compression="zstd")
        case _:
            return file.open("rb")


def is_array(file: Path) -> bool:
    """Whether a JSON file is one array, not a record a line."""
    try:
        with opened(file) as stream:
            while block := stream.read(1 << 12):
                text = block.removeprefix(_BOM).lstrip()
                if text:
                    return text.startswith(b"[")
    except Problem:  # reading it says so again, with a line
        pass
    return False


def blocks(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Block]:
    """The lines of a file in blocks of about 1 MiB, from byte `start`, where line `line` begins, to the line that byte
    `stop` is in or before."""
    pieces: list[bytes] = []  # of a line that goes on
    held = 0
    at = start
    try:
        with opened(file) as stream:
            if start:
                stream.seek(start)
            while data := stream.read(BLOCK if stop is None else max(min(BLOCK, stop - at), 1)):
                at += len(data)
                if stop is not None and at >= stop and not data.endswith(b"\n"):
                    rest = stream.readline(MAX_RECORD)
                    data, at = data + rest, at + len(rest)
                end = data.rfind(b"\n") + 1
                if not end:
                    held += len(data)
                    if held <= MAX_RECORD:
                        pieces.append(data)
                    else:
                        pieces.clear()
                elif held > MAX_RECORD:  # the end of a line that is too long
                    first = data.index(b"\n") + 1
                    yield Block(line, _too_long())
                    line += 1
                    if first < end:
                        yield Block(line, data[first:end])
                        line += data.count(b"\n", first, end)
                    pieces, held = [data[end:]], len(data) - end
                else:
                    whole = b"".join([*pieces, data[:end]])
                    yield Block(line, whole)
                    line += whole.count(b"\n")
                    pieces, held = [data[end:]], len(data) - end
                if stop is not None and at >= stop:
                    break
    except Problem as problem:
        if any(pieces):
            yield Block(line, b"".join(pieces))
        yield Block(line, problem)
        return
    if held > MAX_RECORD:
        yield Block(line, _too_long())
    elif any(pieces):
        yield Block(line, b"".join(pieces))


def _too_long() -> Problem:
    return Problem("not-json", f"the line is longer than {MAX_RECORD >> 20} MiB", "split it into records of their own")


def records_in(block: Block) -> Iterator[tuple[int, Item]]:
    """The records in a block of JSON lines, and the line number of each; blank lines are none."""
    if isinstance(block.lines, Problem):
        yield block.line, block.lines
        return
    parser = _Parser()
    for number, line in enumerate(block.lines.split(b"\n"), start=block.line):
        if number == 1:
            line = line.removeprefix(_BOM)
        line = line.strip()
        if line:
            yield number, parser.record(line)


def read_lines(file: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[tuple[int, Item]]:
    for block in blocks(file, start, stop, line):
        yield from records_in(block)


def read_array(file: Path) -> Iterator[tuple[int, Item]]:
    """The elements of a JSON array, counted from 1, with no more than a few of them in memory."""
    number = 0
    try:
        with opened(file) as stream:
            for number, item in _Parser().elements(stream):
                yield number, item
    except Problem as problem:
        yield number + 1, problem


def read_text(file: Path) -> Iterator[tuple[int, str | Problem]]:
    """The file as texts of at most `MAX_TEXT` bytes, and the line that each begins on; where one is none, the line at fault.

    A file that is no longer is one text. Others are cut behind an empty line, or else a line, a word or a character.
    """
    line, at, held, more = 1, 0, b"", True
    try:
        with opened(file) as stream:
            while more:
                while len(held) <= MAX_TEXT and (data := stream.read(MAX_TEXT + 1 - len(held))):
                    held += data
                more = len(held) > MAX_TEXT
                cut = _text_end(held) if more else len(held)
                try:
                    yield line, held[:cut].removeprefix(b"" if at else _BOM).decode()
                except UnicodeDecodeError as error:
                    yield line + held.count(b"\n", 0, error.start), _not_utf8(error, error.object, at)
                line, at, held = line + held.count(b"\n", 0, cut), at + cut, held[cut:]
    except Problem as problem:
        yield line, problem


def _text_end(data: bytes) -> int:
    """Where to cut what is longer than `MAX_TEXT`, in its last half if that has any border."""
    for border in (b"\n\n", b"\n", b" "):
        if found := data.rfind(border, MAX_TEXT // 2, MAX_TEXT) + 1:
            return found + len(border) - 1
    # no continuation byte of UTF-8 follows; what is none is cut anywhere
    return next((k for k in range(MAX_TEXT, MAX_TEXT - 4, -1) if data[k] & 0xC0 != 0x80), MAX_TEXT)


def read_csv(file: Path) -> Iterator[tuple[int, Item]]:
    """The rows of a table with a header, counted from 1; every value is text."""
    number = 0
    csv.field_size_limit(MAX_RECORD)
    try:
        with opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            rows = csv.reader(text, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                yield 0, Problem("unreadable", f"the header names a column twice: {brief(header)}", "give each its own name")
                return
            for row in rows:
                if row:
                    number += 1
                    if len(row) == len(header):
                        yield number, dict(zip(header, row, strict=True))
                    else:
                        what = f"line {rows.line_num} has {len(row)} values for {len(header)} columns"
                        yield number, Problem("unreadable", what, "put text with commas in it into quotes")
    except UnicodeDecodeError as error:
        yield number + 1, _not_utf8(error, error.object)
    except csv.Error as error:
        yield number + 1, Problem("unreadable", f"line {rows.line_num} is no CSV: {error}", "double the quotes inside of quotes")
    except Problem as problem:
        yield number + 1, problem


def read_rows(file: Path, kind: str, wanted: Sequence[str] | None) -> Iterator[tuple[int, Item]]:
    """The rows of a Parquet or Arrow file, counted from 1; of the columns `wanted`, where they are there (None: all)."""
    import pyarrow

    number = 1
    try:
        for batch in _batches(file, kind, wanted):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException, NotImplementedError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield number, Problem("unreadable", f"cannot be read as {kind} ({reason})", _CUT_SHORT)


def _batches(file: Path, kind: str, wanted: Sequence[str] | None) -> Iterator[Any]:
    import pyarrow

    rows = 1024
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            names = None if wanted is None else [name for name in table.schema_arrow.names if name in wanted]
            if names == [] and table.metadata.num_rows:  # the record's own error names what is there
                names = table.schema_arrow.names
            yield from table.iter_batches(rows, columns=names)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        names = [name for name in reader.schema.names if wanted is None or name in wanted] or reader.schema.names
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file point anywhere
            batch = batch.select(names)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


# --- JSON ------------------------------------------------------------------------------------------------------


def _not_utf8(error: UnicodeDecodeError, data: bytes, before: int = 0) -> Problem:
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in data[:100]:
        return Problem("not-utf-8", "not UTF-8 (it looks like UTF-16)", "save it as UTF-8: iconv -f utf-16 -t utf-8")
    what = f"not UTF-8 ({error.reason}, byte {data[error.start]:#04x} at {before + error.start})"
    return Problem("not-utf-8", what, "save it as UTF-8: iconv -f ENCODING -t utf-8")


class _Parser:
    """JSON as the standard says: no NaN, no key twice, no more than `MAX_DEPTH` levels."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._faults.append(f"the key {brief(twice)} stands twice in an object")
        return made

    def _constant(self, name: str) -> float:
        self._faults.append(f"{name} is no JSON number")
        return 0.0

    def record(self, line: bytes) -> Item:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            return _not_utf8(error, line)
        self._faults.clear()  # of a line that was no JSON
        try:
            value, end = self._decoder.raw_decode(text)
            if end < len(text):
                self._decoder.decode(text)  # says what is wrong with the rest
        except json.JSONDecodeError as error:
            if "\0" in text:
                return Problem("not-json", f"not JSON: a NUL at column {text.index(chr(0)) + 1}", "is it a damaged text file?")
            return Problem("not-json", f"not JSON: {error.msg} at column {error.colno}", "write one JSON object a line")
        except (RecursionError, ValueError) as error:
            return _unusable(error)
        return self._checked(value, text)

    def _checked(self, value: Any, text: str) -> Item:
        faults, self._faults = self._faults, []
        if faults:
            return Problem("not-json", f"not JSON: {faults[0]}", "write each key once, and numbers as JSON has them")
        if not isinstance(value, dict):
            kind = {list: "a list", str: "text", type(None): "null", bool: "a truth value"}.get(type(value), "a number")
            return Problem("not-a-record", f"a record should be an object {{…}}, not {kind}", "write one object for each record")
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            return _unusable(RecursionError())
        return value

    def elements(self, stream: Any) -> Iterator[tuple[int, Item]]:
        """Raises Problem where the array goes wrong, so that nothing behind it can be read."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, at, line, number = stream.read(BLOCK).removeprefix(_BOM), 0, 1, 0

        def decoded(data: bytes) -> str:
            try:
                return decoder.decode(data, not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, error.object) from error

        text = decoded(text) if text else ""

        def more(size: int = BLOCK) -> bool:
            """Read on; what lies before `at` is let go."""
            nonlocal text, at, line
            data = stream.read(size)
            line += text.count("\n", 0, at)
            text, at = text[at:] + decoded(data), 0
            return bool(data)

        def next_is(characters: str) -> str:
            """The next character but white space, taken where it is one of these."""
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text):
                    break
                if not more():
                    raise Problem("not-json", f"not JSON: the array ends on line {here()} without ]", _CUT_SHORT)
            if text[at] in characters:
                at += 1
                return text[at - 1]
            return ""

        def here() -> int:
            return line + text.count("\n", 0, at)

        assert next_is("[")
        while not next_is("]"):
            if number and not next_is(","):
                raise Problem("not-json", f"not JSON: no , before {brief(text[at : at + 20])} on line {here()}", "put it there")
            next_is("")
            number += 1
            while True:
                self._faults.clear()
                try:
                    value, end = self._decoder.raw_decode(text, at)
                    if end < len(text):
                        break
                    if not more():  # `at` is 0 now
                        end = len(text)
                        break
                except json.JSONDecodeError as error:
                    if len(text) - at > MAX_RECORD or not more(max(BLOCK, len(text) - at)):
                        number_of_line = line + text.count("\n", 0, error.pos)
                        what = f"not JSON: {error.msg} on line {number_of_line}"
                        raise Problem("not-json", what, "write an array of objects, or one object a line") from error
                except (RecursionError, ValueError) as error:
                    raise _unusable(error) from error
            yield number, self._checked(value, text[at:end])
            at = end
        if text[at:].strip() or any(block.strip() for block in iter(lambda: stream.read(BLOCK), b"")):
            raise Problem(
                "not-json", f"not JSON: something follows the array on line {here()}", "write one array, or one object a line"
            )


def _unusable(error: Exception) -> Problem:
    if isinstance(error, RecursionError):
        return Problem("not-json", f"not JSON that can be used: nested deeper than {MAX_DEPTH} levels", "write it flatter")
    return Problem("not-json", f"not JSON that can be used: {error}", "write long numbers as text")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if inner.__class__ in (dict, list)
        ]
    return depth
