"""Small files that only save work, such as a remembered hash: each has a checksum, and a damaged one counts as missing."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

from moe_train.machine.files import write_bytes

log = logging.getLogger(__name__)


def read_checked(file: Path) -> str | None:
    """Return the text of a file that `write_checked` wrote; None if it is missing, or damaged, which is logged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(file.parent, "read", error.strerror or str(error))
        return None
    checksum, _, text = content.partition(b"\n")
    if checksum == _checksum(text):
        return text.decode()
    log.warning("%s is damaged; it is made again", file)
    return None


def write_checked(file: Path, text: str) -> None:
    """Replace a file atomically by a checksum and a text; that it cannot be written is logged and no error."""
    content = text.encode()
    try:
        write_bytes(file, _checksum(content) + b"\n" + content)
    except OSError as error:
        _warn_once(file.parent, "write", error.strerror or str(error))


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


@functools.cache
def _warn_once(folder: Path, verb: str, reason: str) -> None:
    """Log that the files of a folder cannot be used."""
    log.warning("cannot %s the files in %s (%s), so each start computes again what they would remember", verb, folder, reason)
