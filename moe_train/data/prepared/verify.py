"""Check that the files of a prepared set have the bytes that its manifest states, once for each set and machine."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_train.data.prepared.folder import File, LocalFolder, RemoteFolder
from moe_train.data.prepared.manifest import MANIFEST, Manifest, ShardEntry

log = logging.getLogger(__name__)
_SAID_BYTES = 1 << 30  # hashing more than this takes long enough to say so


def verify_set(folder: LocalFolder | RemoteFolder, manifest: Manifest, memory: Path) -> None:
    """Compare the hashes of the files of a prepared set with its manifest.

    The hash of a file is remembered until its size or its modification time changes. Of a set in a bucket that is larger than its
    cache, only objects that were written after the manifest are read: they have replaced what was copied there.

    Args:
        folder: The folder of the set.
        manifest: Its manifest.
        memory: The folder in which hashes are remembered.

    Raises:
        ValueError: If a shard has other bytes than the manifest states.
    """
    size = sum(sum(shard.sizes.values()) for shard in manifest.shards)
    if size > _SAID_BYTES:
        log.info("%s: comparing %.1f GiB with their hashes, unless this machine has done so before", folder.path, size / 2**30)
    # Several shards of a set share one folder if their content is the same.
    shards = list({shard.name: shard for shard in manifest.shards}.values())
    if isinstance(folder, RemoteFolder) and size > folder.cache_bytes:
        # All of such a set would have to be fetched just to compare it, and fetched again to train on it.
        written = folder.modified(MANIFEST)
        shards = [shard for shard in shards if _is_replaced(folder, shard, written)]

    def digest_of(shard: ShardEntry) -> str:
        """Return the hash of a shard, as `tokenize_shard` computed it."""
        digest = hashlib.sha256(manifest.dtype.encode())
        for name in sorted(shard.sizes):
            # As bytes, whatever the file's own dtype.
            file = File(f"{shard.name}/{name}", "uint8", shard.sizes[name])
            digest.update(name.encode() + bytes.fromhex(folder.sha256(file, memory)))
        return digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "verify") as threads:
        for shard, digest in zip(shards, threads.map(digest_of, shards), strict=True):
            if digest != shard.sha256:
                raise ValueError(
                    f"{folder.path}/{shard.name} is damaged: its files do not have the hash that {MANIFEST} states; {folder.remedy}"
                )


def _is_replaced(folder: RemoteFolder, shard: ShardEntry, written: float | None) -> bool:
    """Return whether an object of a shard is newer than the manifest, which is copied last, or its age is unknown."""
    times = [folder.modified(f"{shard.name}/{name}") for name in shard.sizes]
    return written is None or any(time is None or time > written for time in times)
