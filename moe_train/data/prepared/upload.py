"""Copy prepared sets to a place that several machines read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.data.prepared.bucket import fault, open_files
from moe_train.data.prepared.manifest import MANIFEST

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def upload(directory: str, to: str) -> str:
    """Copy a prepared set into a folder or bucket.

    The manifest is copied last, so a set with a manifest is complete. Shards that are already there are not copied again.

    Args:
        directory: The prepared set.
        to: The folder or bucket (any file system of fsspec).

    Returns:
        The path or URL of the copy.

    Raises:
        ValueError: In one line, if the URL cannot be opened.
        FileNotFoundError: If the bucket or a file is missing.
        PermissionError: If access is refused.
        OSError: If the store cannot be reached.
    """
    files, root = open_files(to)
    name = Path(directory).name
    target = f"{root.rstrip('/')}/{name}"
    try:
        # The folder is named by its content, so a complete copy of that name has the same content.
        if not files.exists(f"{target}/{MANIFEST}"):
            shards = sorted(path for path in Path(directory).rglob("*") if path.is_file() and path.name != MANIFEST)
            for path in [*shards, Path(directory) / MANIFEST]:
                _copy(path, files, f"{target}/{path.relative_to(directory).as_posix()}")
    except Exception as error:  # each file system has its own exceptions
        raise fault(to, error) from error
    return f"{to.rstrip('/')}/{name}"


def _copy(path: Path, files: AbstractFileSystem, goal: str) -> None:
    """Copy a file, unless the target exists with the same size; the manifest is always copied."""
    # Shards are named by their content, so a complete one need not be sent again after an interrupted upload.
    if path.name != MANIFEST and files.exists(goal) and files.size(goal) == path.stat().st_size:
        return
    # An object store has no folders, and would create a bucket for a misspelt name.
    if not files.async_impl:
        files.makedirs(goal.rpartition("/")[0], exist_ok=True)
    files.put_file(str(path), goal)
