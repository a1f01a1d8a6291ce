"""The content of what a reference of a record names: a data URL, or a file."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from moe_train.data.records.problem import Problem

MOST_BYTES = 2**31
"""Largest file that is read."""


def data_of(reference: str, name: str, rule: str, kind: str) -> bytes:
    """Return the content of a file or a data URL; nothing is fetched.

    Args:
        reference: a data URL, or the path of a file.
        name: the reference in short, for messages.
        rule: the rule that an unusable reference breaks.
        kind: what it holds, for messages.

    Raises:
        Problem: there is no such file, or the URL is not base64.
    """
    if not reference.startswith("data:"):
        return _of_file(Path(reference), name, rule, kind)
    header, comma, content = reference.partition(",")
    if not comma or not header.endswith(";base64"):
        raise Problem(rule, f"{name} is no data URL of {kind}", "write data:TYPE;base64,…")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(rule, f"the data URL {name} is not base64: {error}", f"encode the {kind} again") from error


def _of_file(file: Path, name: str, rule: str, kind: str) -> bytes:
    try:
        # Reading a pipe or a device could wait for ever.
        if file.exists() and not file.is_file() and not file.is_dir():
            raise Problem(rule, f"the {kind} {name} is a pipe or a device", "name a file, or drop the record")
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise Problem(rule, f"the {kind} {name} has {size:,} bytes, and at most {MOST_BYTES:,} are read", "drop the record")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise Problem(rule, f"there is no {kind} {file}", "copy it there, or drop the record") from error
    except OSError as error:
        message = f"the {kind} {name} cannot be read: {error.strerror}"
        raise Problem(rule, message, "correct the path, or drop the record") from error
