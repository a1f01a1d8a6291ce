"""Prepared sets copied to where several machines read them."""

from __future__ import annotations

from pathlib import Path

from moe_train.data.manifest import NAME


def upload(directory: str, to: str) -> str:
    """Copy a prepared set into the folder or bucket `to` (any file system of fsspec); return where it is now.

    The manifest comes last, so that what has one is whole; shards that are there already stay.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(to)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{to} cannot be opened: {' '.join(str(error).split())}") from error
    name = Path(directory).name
    there = f"{root.rstrip('/')}/{name}"
    if not files.exists(f"{there}/{NAME}"):
        every = sorted(path for path in Path(directory).rglob("*") if path.is_file() and path.name != NAME)
        for path in [*every, Path(directory) / NAME]:
            goal = f"{there}/{path.relative_to(directory).as_posix()}"
            if path.name == NAME or not files.exists(goal) or files.size(goal) != path.stat().st_size:
                files.makedirs(goal.rpartition("/")[0], exist_ok=True)
                files.put_file(str(path), goal)
    return f"{to.rstrip('/')}/{name}"
