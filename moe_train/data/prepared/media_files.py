"""The files of the pictures and the sound in a shard as they were when it was made, so that a later change is noticed.

A shard is known by the content of its records, which name files without saying what is in them: other folders may have the same
records beside other files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_train.data.chat.example import Example

FileState = tuple[int, int, str]
"""Size in bytes, time of modification in ns, and sha256 of a file."""


class MediaFiles:
    """The states of all files of pictures and sound of a shard, by the number of their span and their path in its folder."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, FileState]] = {}

    def add(self, span: int, folder: Path | None, example: Example) -> None:
        """Note the files of an example's pictures or sound.

        Args:
            span: Number of the span of the shard that the example is from.
            folder: The folder of its records; None if all references are data URLs.
            example: The example.
        """
        if not example.media_files:
            return
        assert folder is not None  # as the files were found in it
        states = self.states.setdefault(span, {})
        root = folder.resolve()
        for file in example.media_files:
            name = str(Path(file).relative_to(root))
            if name not in states:
                states[name] = _state(Path(file))


def _state(file: Path) -> FileState:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()


def changed_file(directory: Path, folders: Sequence[Path | None]) -> Path | None:
    """Return a file that is missing, or another one than in the shard `directory`; None if there is none.

    Content is read only where size or time differ.

    Args:
        directory: The shard.
        folders: The folder of the records of each of its spans, as they are now.
    """
    by_span = json.loads((directory / "facts.json").read_bytes()).get("media_files", {})
    for span, states in by_span.items():
        folder = folders[int(span)]
        if folder is None:
            return Path(next(iter(states)))
        for name, (size, modified, sha256) in states.items():
            file = folder.resolve() / name
            if not file.is_file():
                return file
            status = file.stat()
            if (status.st_size, status.st_mtime_ns) != (size, modified) and _state(file)[2] != sha256:
                return file
    return None
