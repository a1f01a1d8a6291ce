"""Read the members of zip archives as files: `archive.zip/folder/member.jsonl` is the path of a member.

Nothing is unpacked to disk, except that Parquet and Arrow members are copied to a temporary file, since they are read out of order.
An archive is refused as a whole if a member has an unsafe name, is encrypted, a link or an archive itself, or if the archive
expands more than data do.
"""

from __future__ import annotations

import contextlib
import functools
import io
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moe_train.data.records.problem import Problem, brief

SUFFIX = ".zip"
MAX_MEMBERS = 10_000
MAX_EXPANSION = 100
"""Largest ratio of the size of all members to the size of the archive; text of records rarely reaches 20."""
_SMALL = 64 << 20  # bytes that an archive may expand to at any ratio
_NESTED = (".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# The errors of Python's reader of archives for a damaged one.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    struct.error,
)


def archive_of(path: Path) -> Path | None:
    """Return the archive that contains `path`, which is the path of a member or of a folder in it; None if there is none."""
    # Called for every file, so the file system is asked only about paths that can contain an archive.
    if SUFFIX not in str(path).lower():
        return None
    for parent in path.parents:
        if parent.suffix.lower() == SUFFIX and parent.is_file():
            return parent
    return None


def is_archive(path: Path) -> bool:
    """Return whether `path` is an archive."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def members(archive: Path) -> list[Path]:
    """Return the paths of the files in an archive, sorted.

    Raises:
        Problem: If the archive is damaged or refused.
    """
    return sorted(archive / name for name in _directory(archive))


def damage_of(archive: Path) -> Problem | None:
    """Return the problem with an archive that is damaged or refused; None if its members can be read."""
    try:
        _directory(archive)
    except Problem as problem:
        return problem
    return None


def compressed_size(archive: Path, path: Path) -> int:
    """Return the size of a member in the archive, in bytes."""
    return _member(archive, path).compress_size


@contextmanager
def open_member(archive: Path, path: Path) -> Iterator[IO[bytes]]:
    """Open a member for reading bytes; a context manager.

    Raises:
        Problem: If the member is damaged, here or while reading.
    """
    info = _member(archive, path)
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(archive)).open(info))
        except _DAMAGED as error:
            raise _damaged_member(error) from error
        # A raw stream reads lines byte by byte; the buffer does not.
        yield stack.enter_context(io.BufferedReader(_Member(stream)))


class _Member(io.RawIOBase):
    """The stream of a member, which raises Problem in place of the many errors of Python's reader of archives."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into `buffer`."""
        try:
            data = self._stream.read(len(buffer))
        except _DAMAGED as error:
            raise _damaged_member(error) from error
        buffer[: len(data)] = data
        return len(data)


def _damaged_member(error: Exception) -> Problem:
    """Return the problem for a member that cannot be decompressed."""
    reason = " ".join(str(error).split())
    return Problem("unreadable", f"cannot be unpacked to its end ({reason})", "is the archive cut short? fetch or write it again")


def _member(archive: Path, path: Path) -> zipfile.ZipInfo:
    """Return the directory entry of a member. Raises FileNotFoundError if there is none."""
    name = path.relative_to(archive).as_posix()
    try:
        return _directory(archive)[name]
    except KeyError:
        raise FileNotFoundError(f"{archive} has no member {name}") from None


def _directory(archive: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the files in an archive by name, after checking them."""
    status = archive.stat()
    return _read_directory(archive, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read_directory(archive: Path, size: int, modified: int) -> dict[str, zipfile.ZipInfo]:
    """Read and check the directory of an archive of a given size and time of modification, which key the cache."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [info for info in opened.infolist() if not info.is_dir()]
    except _DAMAGED as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = " ".join(str(error).split())
        raise Problem("unreadable", f"cannot be read as a zip archive ({reason})", "is it cut short? fetch it again") from error
    if len(entries) > MAX_MEMBERS:
        raise _refused(f"has {len(entries)} members, more than {MAX_MEMBERS}")
    expanded = sum(info.file_size for info in entries)
    # A bomb of a few kilobytes can expand to terabytes; the sizes are those that the directory states.
    if expanded > max(_SMALL, MAX_EXPANSION * size):
        raise _refused(f"expands from {size} to {expanded} bytes, more than {MAX_EXPANSION} times its size")
    files: dict[str, zipfile.ZipInfo] = {}
    for info in entries:
        if unsafe := _fault(info):
            raise _refused(f"has the member {brief(info.filename)}, which {unsafe}")
        if info.filename in files:
            raise _refused(f"has two members named {brief(info.filename)}")
        files[info.filename] = info
    return files


def _fault(info: zipfile.ZipInfo) -> str | None:
    """Describe why a member is not read; None if it may be."""
    name = info.filename
    parts = name.split("/")
    # Paths that leave the archive, or mean different files on different systems.
    if name.startswith("/") or re.match("[a-zA-Z]:", name) or "\\" in name or any(part in ("", ".", "..") for part in parts):
        return "is no path below the archive"
    if not name.isprintable() or (not name.isascii() and "\ufffd" in name):
        return "has a name that cannot be printed"
    if info.flag_bits & 1:
        return "is encrypted"
    # Archives made on Unix keep the file's mode in the upper 16 bits.
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    if info.compress_type not in _METHODS:
        return f"is compressed by the method {info.compress_type}, which Python does not read"
    if PurePosixPath(name).suffix.lower() in _NESTED:
        return "is packed once more"
    return None


def _refused(what: str) -> Problem:
    """Return the problem with an archive that is not read."""
    return Problem("unreadable", what, "unpack the archive, and name the files that are meant")
