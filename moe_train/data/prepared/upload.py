"""Copy prepared sets to where several machines read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.data.prepared.bucket import fault, open_files
from moe_train.data.prepared.manifest import NAME


def upload(directory: str, to: str) -> str:
    """Copy a prepared set into the folder or bucket `to` (any file system of fsspec); return where it is now.

    The manifest comes last, so that a set with a manifest is complete; shards that are there already stay.
    Raises ValueError, FileNotFoundError, PermissionError or OSError in one line.
    """
    files, root = open_files(to)
    name = Path(directory).name
    target = f"{root.rstrip('/')}/{name}"
    try:
        if not files.exists(f"{target}/{NAME}"):
            shards = sorted(path for path in Path(directory).rglob("*") if path.is_file() and path.name != NAME)
            for path in [*shards, Path(directory) / NAME]:
                _copy(path, files, f"{target}/{path.relative_to(directory).as_posix()}")
    except Exception as error:  # each file system has its own
        raise fault(to, error) from error
    return f"{to.rstrip('/')}/{name}"


def _copy(path: Path, files: Any, goal: str) -> None:
    if path.name != NAME and files.exists(goal) and files.size(goal) == path.stat().st_size:
        return
    if not files.async_impl:  # a store of objects has no folders, and would make a bucket of a misspelt name
        files.makedirs(goal.rpartition("/")[0], exist_ok=True)
    files.put_file(str(path), goal)
