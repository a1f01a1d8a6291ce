"""Atomic creation of directories and files: written under another name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"
"""A value that can be written as JSON."""
JsonObject = dict[str, Any]
"""A JSON object. `Any`, since each reader checks the types of the keys that it uses."""


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory next to `path`; when the block succeeds, sync its files and rename it to `path`.

    Nothing is overwritten; only an empty directory at `path` is replaced. If the block fails, the new directory is removed.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
        ValueError: `path` is a URL.
        OSError: writing failed, for instance because the disk is full.
    """
    path = Path(path)
    refuse_existing(path)  # fail before the work, not after it
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        yield unfinished
        # Before the rename: otherwise a crash could leave the final name with files that are still empty.
        for entry in sorted(unfinished.rglob("*")):
            _sync(entry)
        _sync(unfinished)
        unfinished.chmod(0o777 & ~_umask())  # mkdtemp creates it for the owner only
        refuse_existing(path)
        os.rename(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"No space left on device; {path} was not written") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: if several processes do so, it holds the complete text of one of them."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically, like `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within a file system; the random part keeps writers apart.
    unfinished = path.with_name(f".{path.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Check that `path` can be created.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
        ValueError: `path` is a URL.
    """
    scheme = path.parts[0] if path.parts else ""
    if scheme.endswith(":") and len(scheme) > 2:  # a Windows drive has one letter
        raise ValueError(f"{path} is a URL, but a directory is needed; write to a file system, and copy the result")
    if path.is_file():
        raise FileExistsError(f"{path} already exists; remove it, or choose another name")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not empty; remove it, or choose another directory")


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Also for directories: a rename is durable only after its directory is synced.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(file: Path) -> JsonObject:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not JSON or holds something other than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object; restore the file")
    return value


def check_space(out_dir: str | Path, num_bytes: int) -> None:
    """Raise OSError, before anything is written, if the disk of `out_dir` has less than `num_bytes` free."""
    # The folder itself need not exist yet; its disk is that of the nearest folder above it.
    existing = next(path for path in Path(out_dir).absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{out_dir} needs {num_bytes / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free; choose another disk",
        )
