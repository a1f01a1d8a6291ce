"""The environment that a proof records: hashes of files, versions and hardware."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import jax

RECORD_FILE = "export_proof.json"
"""Name of the record in an export."""


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file except the record itself, by relative path."""

    def digest(file: Path) -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file.name != RECORD_FILE]
    # hashlib releases the interpreter's lock, so threads hash several files at a time.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, files)
        return {str(file.relative_to(directory)): file_digest for file, file_digest in zip(files, digests, strict=True)}


class Hardware(TypedDict):
    """The hardware of a proof; the keys are those of the record."""

    devices: dict[str, int]
    """Number of devices of each kind."""
    processes: int
    host: str
    """Architecture of the host, such as x86_64."""


def hardware() -> Hardware:
    """Return the devices, the number of processes and the host's architecture."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return {"devices": dict(kinds), "processes": jax.process_count(), "host": platform.machine()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a proof depends on."""
    packages = ("moe_train", "jax", "flax", "numpy", "safetensors", "tokenizers", "jinja2", "mistral_common", "gguf")
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # some are optional
            continue
    return installed
