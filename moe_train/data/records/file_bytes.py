"""Read the bytes of local files, decompressed if needed, and describe bytes that cannot be read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_train.data.records import zip_archive
from moe_train.data.records.problem import Problem

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""File name suffixes of the supported compressions."""
BLOCK = 1 << 20  # bytes per read
MAX_RECORD = 64 << 20  # bytes of a record; a longer one is skipped without being kept in memory
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"ARROW1": "Arrow",
}  # fmt: skip
"""The first bytes of files that are no text -> their format."""
_MAGIC_OF_SUFFIX = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}
_LONGEST_MAGIC = 5
BOM = codecs.BOM_UTF8
_ENCODE = "save it as UTF-8: iconv -f ENCODING -t utf-8"
CUT_SHORT = "is it cut short? fetch or write it again"
"""The remedy for a file that ends too early."""


def is_compressed(file: Path) -> bool:
    """Return whether a file is compressed from outside: by the suffix of its name, or as a member of an archive."""
    return file.suffix.lower() in COMPRESSIONS or zip_archive.archive_of(file) is not None


@contextmanager
def open_bytes(file: Path) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed if needed; a context manager.

    Raises:
        Problem: If decompression fails while reading.
    """
    archive = zip_archive.archive_of(file)
    if archive is not None:
        with zip_archive.open_member(archive, file) as stream:
            yield stream
        return
    try:
        with _stream(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # gzip and bz2 report damage as OSError too; a file that is missing or not readable is no damage.
        if not is_compressed(file) or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        with file.open("rb") as stream:
            start = stream.read(_LONGEST_MAGIC)
        suffix = file.suffix.lower()
        # An empty file is one that was cut short.
        if start and not start.startswith(_MAGIC_OF_SUFFIX[suffix]):
            raise Problem("unreadable", f"not compressed as {suffix} is", "give the file the ending of its format") from error
        raise Problem("unreadable", f"cannot be unpacked to its end ({error})", CUT_SHORT) from error


@contextmanager
def open_stored(file: Path) -> Iterator[Any]:
    """Open the bytes of a file as they are stored, without decompression from outside, for hashing; a context manager."""
    archive = zip_archive.archive_of(file)
    if archive is None:
        with file.open("rb") as stream:
            yield stream
        return
    try:
        with zip_archive.open_member(archive, file) as stream:
            yield stream
    except Problem as problem:
        raise ValueError(f"{file}: {problem}") from problem


@contextmanager
def on_disk(file: Path) -> Iterator[Path]:
    """Give the path of a file that can be read out of order: its own, or for a member of an archive that of a temporary copy."""
    archive = zip_archive.archive_of(file)
    if archive is None:
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="moe-train-") as copy:
        with zip_archive.open_member(archive, file) as stream:
            shutil.copyfileobj(stream, copy, BLOCK)
        # The copy is opened again by its name, past the buffer of this stream.
        copy.flush()
        yield Path(copy.name)


def size_of(file: Path) -> int:
    """Return the size of a file in bytes; of a member of an archive, its compressed size."""
    archive = zip_archive.archive_of(file)
    return file.stat().st_size if archive is None else zip_archive.compressed_size(archive, file)


def _stream(file: Path) -> Any:
    """Open the stream that decompresses the file."""
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file)
        case ".bz2":
            return bz2.open(file)
        case ".xz":
            return lzma.open(file)
        case ".zst":
            # Python has no zstd of its own before 3.14.
            import pyarrow

            return pyarrow.input_stream(str(file), compression="zstd")
        case _:
            return file.open("rb")


def utf16() -> Problem:
    """Return the problem for a file that looks like UTF-16."""
    return Problem("not-utf-8", "not UTF-8 (it looks like UTF-16)", "save it as UTF-8: iconv -f utf-16 -t utf-8")


def _utf32() -> Problem:
    """Return the problem for a file that begins with the byte order mark of UTF-32."""
    return Problem("not-utf-8", "not UTF-8 (it looks like UTF-32)", "save it as UTF-8: iconv -f utf-32 -t utf-8")


def looks_like_utf16(line: bytes) -> bool:
    """Return whether a line that decodes as UTF-8 looks like UTF-16.

    It does if a quarter to three quarters of its bytes are NUL, or if it is the single NUL that remains of a file's last line end.
    """
    return line == b"\0" or 1 <= 4 * line.count(0) / len(line) <= 3


def not_utf8(error: UnicodeDecodeError, before: int = 0) -> Problem:
    """Return the problem for bytes that are not UTF-8.

    Args:
        error: The decoding error.
        before: Number of bytes of the file before those that were decoded, so that the message counts from the file's start.
    """
    start = error.object[:100]
    for magic, name in _MAGIC.items():
        if not before and start.startswith(magic):
            return Problem("not-utf-8", f"not UTF-8 (it looks like {name})", "give the file the ending of its format")
    # Before UTF-16, whose little-endian mark that of UTF-32 begins with.
    if not before and start[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return _utf32()
    # UTF-16 has a NUL in every second byte of text that is ASCII.
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or looks_like_utf16(start):
        return utf16()
    message = f"not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x} at {before + error.start})"
    return Problem("not-utf-8", message, _ENCODE)


def not_utf8_on_line(byte: int, line: int) -> Problem:
    """Return the problem for a byte on a line that is not UTF-8."""
    return Problem("not-utf-8", f"not UTF-8 (byte {byte:#04x} before the end of line {line})", _ENCODE)
