"""Identity of the code that runs: a hash over the files of the installed package."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_sha256() -> str:
    """Return the sha256 over the names and contents of the package's source files, which is the same on every machine."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        content = file.read_bytes()
        # The length separates a file from the next one.
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
