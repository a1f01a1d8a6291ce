"""The revision of this package's code: its version, a hash over its files, and the git commit of a checkout."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
"""Folder of the package."""
_ENDINGS = (".py", ".jinja")
_SECONDS = 10
"""Longest time that git may take, in seconds."""


class CodeRevision(NamedTuple):
    """The code that a process runs; the keys are those of the records."""

    version: str
    """Version of the package."""
    package_sha256: str
    """Hash over the names and contents of the package's files, the same for a checkout and an installed wheel."""
    commit: str | None
    """Commit of the checkout; None for an installed wheel, or if git is not installed."""
    is_dirty: bool | None
    """Whether files of the package differ from the commit; None without a commit."""

    def in_words(self) -> str:
        """Return the revision as one phrase."""
        if self.commit is None:
            return f"version {self.version}, package sha256 {self.package_sha256[:16]}, installed without a git checkout"
        state = "with changes that are not committed" if self.is_dirty else "without changes"
        return f"version {self.version}, commit {self.commit[:12]} {state}, package sha256 {self.package_sha256[:16]}"


@functools.cache
def code_revision() -> CodeRevision:
    """Return the revision of the code, as its files are when this is first called in the process."""
    from moe_train import __version__

    commit = _git("rev-parse", "HEAD") if (PACKAGE.parent / ".git").exists() else None
    is_dirty = None
    if commit is not None:
        # Of the package alone: a config or a note beside it changes nothing that runs.
        is_dirty = _git("status", "--porcelain", "--", PACKAGE.name) != ""
    return CodeRevision(__version__, hash_of_package(PACKAGE), commit, is_dirty)


def hash_of_package(folder: Path) -> str:
    """Return the sha256 over the names and contents of a package's source files, in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _ENDINGS:
            # The length delimits the content, so that no two packages give the same stream of bytes.
            content = file.read_bytes()
            total.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()


def _git(*arguments: str) -> str | None:
    """Return what git prints about the checkout; None if it is not installed, or refuses."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
