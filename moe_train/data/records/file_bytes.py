"""The bytes of a local file, unpacked where it is compressed, and what to say of bytes that cannot be read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_train.data.records.problem import Problem

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 20  # bytes to read at a time
MAX_RECORD = 64 << 20  # bytes of a record; a longer one is passed over without being held
BOM = codecs.BOM_UTF8
CUT_SHORT = "is it cut short? fetch or write it again"


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSIONS


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked. Errors of the unpacking are raised as Problem."""
    try:
        with _stream(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if not is_compressed(file) or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise Problem("unreadable", f"cannot be unpacked to its end ({error})", CUT_SHORT) from error


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


def utf16() -> Problem:
    return Problem("not-utf-8", "not UTF-8 (it looks like UTF-16)", "save it as UTF-8: iconv -f utf-16 -t utf-8")


def looks_like_utf16(line: bytes) -> bool:
    """Of a line that can be decoded as UTF-8: whether about half of it is NUL, or it is the rest of a file's last line end."""
    return line == b"\0" or 1 <= 4 * line.count(0) / len(line) <= 3


def not_utf8(error: UnicodeDecodeError, before: int = 0) -> Problem:
    """before: bytes of the file that stand before those that were decoded, where the message should count from its start."""
    if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in error.object[:100]:
        return utf16()
    what = f"not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x} at {before + error.start})"
    return Problem("not-utf-8", what, "save it as UTF-8: iconv -f ENCODING -t utf-8")
