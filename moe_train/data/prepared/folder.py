"""The files of a folder, local or in a bucket, as arrays that are read on demand.

A local file is memory-mapped. A file in a bucket is fetched block by block with range requests, and the most recently used
blocks stay in memory, up to a limit.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.prepared.bucket import PATIENCE, fault, open_files, reason
from moe_train.data.records.scan import scan_file
from moe_train.machine.checked_file import read_checked, write_checked

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_REQUESTS = 16  # requests in flight at once, since the latency of a store is much longer than the transfer of a block
_WAITS = 1.0, 5.0, 25.0  # seconds to wait before each retry
_LATER_WAITS = 60.0, 120.0, 240.0  # further waits if the store has answered before, so that a run survives a restart of the store

_ending = threading.Event()
"""Set when the interpreter begins to exit."""
# `atexit` runs too late: only after the interpreter has waited for the threads of pools, which may be waiting for a retry.
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


class File(NamedTuple):
    """A file of a prepared set."""

    name: str
    """The name in the folder."""
    dtype: str
    """The dtype of the numbers in the file."""
    size: int
    """The size in bytes."""


class LocalFolder:
    """A folder of a local file system."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.remedy = f"remove {path}, and prepare the data again"

    def text(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.path / name).read_bytes()

    def array(self, file: File) -> np.ndarray:
        """Return the file as a memory-mapped array.

        Raises:
            ValueError: If it has another size than stated, or is missing.
        """
        path = self.path / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            raise ValueError(f"{path} is damaged (not {file.size} bytes); {self.remedy}")
        # An empty file cannot be mapped.
        if not file.size:
            return np.zeros(0, file.dtype)
        # A plain view, since each slice of an np.memmap would be one too, which takes longer to make.
        return np.memmap(path, dtype=file.dtype, mode="r").view(np.ndarray)

    def sha256(self, file: File, memory: Path) -> str:
        """Return the hash of a file, remembered in the folder `memory` until its size or modification time changes.

        Raises:
            ValueError: If it has another size than stated, or is missing.
        """
        # Checks the size first, so that a file that is cut short is named as such.
        self.array(file)
        sha256 = scan_file(self.path / file.name, False, memory).sha256
        assert sha256 is not None  # it is None only for sources that are no files
        return sha256

    def read_whole(self, files: Sequence[File]) -> list[np.ndarray]:
        """Return files as arrays."""
        return [self.array(file) for file in files]

    def read(self, parts: Sequence[ArrayPart]) -> list[np.ndarray]:
        """Return the elements of each part."""
        return [array[start:stop] for array, start, stop in parts]


class RemoteFolder:
    """A folder of a bucket; at most `cache_mib` MiB of its files stay in memory."""

    def __init__(self, url: str, cache_mib: int, block: int = _BLOCK) -> None:
        self.path = url
        self.remedy = "copy the prepared data there again"
        self._files, self._root = open_files(url)
        # Only asynchronous file systems take a timeout with each call.
        self._timeout = {"timeout": PATIENCE} if self._files.async_impl else {}
        self._block_size = block
        self.cache_bytes = cache_mib << 20
        # At least one, or no block could be returned at all.
        self._max_blocks = max(1, self.cache_bytes // block)
        # Per instance rather than on the method, so that each folder has its own limit and is freed with its blocks.
        self.block = functools.lru_cache(self._max_blocks)(self._block)
        self._threads = ThreadPoolExecutor(_REQUESTS, "range")

    def text(self, name: str) -> bytes:
        """Return the content of a file."""
        # The short waits only: a wrong URL should fail soon, and nothing is lost yet.
        return self._threads.submit(self._read, name, _WAITS).result()

    def modified(self, name: str) -> float | None:
        """Return when a file was written, in seconds since 1970; None if the store does not say."""
        try:
            return float(self._files.modified(f"{self._root}/{name}").timestamp())
        except FileNotFoundError as error:
            raise fault(f"{self.path}/{name}", error) from error
        except Exception as error:  # each file system has its own exceptions
            log.info("%s/%s: its age is unknown (%s)", self.path, name, reason(error))
            return None

    def sha256(self, file: File, memory: Path) -> str:
        """Return the hash of a file, remembered in the folder `memory` until its size or modification time changes.

        Blocks go through the cache, so that those of a small set are fetched only once.
        """
        modified = self.modified(file.name)
        key = json.dumps([self.path, file.name, file.size, modified])
        remembered = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.checked-sha256"
        known = None if modified is None else read_checked(remembered)
        if known is not None:
            return known
        digest = hashlib.sha256()
        keys = self._keys(file, 0, file.size)
        for first in range(0, len(keys), _REQUESTS):  # a few blocks in memory at a time
            for block in self._threads.map(lambda key: self.block(*key), keys[first : first + _REQUESTS]):
                digest.update(block)
        if modified is not None and time.time() - modified > 2:  # else it can change again within one tick of its time
            write_checked(remembered, digest.hexdigest())
        return digest.hexdigest()

    def array(self, file: File) -> RemoteArray:
        """Return the file as an array of which slices can be read; nothing is fetched yet."""
        return RemoteArray(self, file)

    def read_whole(self, files: Sequence[File]) -> list[np.ndarray]:
        """Return files as arrays in memory, bypassing the cache.

        Raises:
            ValueError: If a file has another size than stated.
        """
        # Past the cache: these files are read once, and would push out blocks that are needed again.
        keys = [self._keys(file, 0, file.size) for file in files]
        blocks = self._threads.map(lambda key: self._block(*key), itertools.chain.from_iterable(keys))
        arrays = []
        for file, file_keys in zip(files, keys, strict=True):
            # `map` returns blocks in order, so each file takes as many as it has keys.
            content = b"".join(itertools.islice(blocks, len(file_keys)))
            arrays.append(np.frombuffer(content, file.dtype))
        return arrays

    def read(self, parts: Sequence[ArrayPart]) -> list[np.ndarray]:
        """Return the elements of each part.

        Blocks are fetched several at a time, but never more of them than the cache holds, so that each is fetched only once.
        """
        spans = []  # first and last byte of each part
        part_keys = []
        for array, start, stop in parts:
            assert isinstance(array, RemoteArray), "the arrays of a bucket are read on demand"
            item_bytes = array.dtype.itemsize
            spans.append((start * item_bytes, stop * item_bytes))
            part_keys.append(self._keys(array.file, *spans[-1]))
        # Collect parts into groups whose blocks fit into the cache together, then fetch the blocks of a group in parallel.
        arrays: dict[int, np.ndarray] = {}
        # Sorted by their blocks, so that parts that share blocks come into the same group.
        todo = sorted(range(len(parts)), key=part_keys.__getitem__, reverse=True)
        while todo:
            group = [todo.pop()]
            keys = dict.fromkeys(part_keys[group[0]])
            while todo:
                extended = keys | dict.fromkeys(part_keys[todo[-1]])
                if len(extended) > self._max_blocks:
                    break
                keys = extended
                group.append(todo.pop())
            blocks = dict(zip(keys, self._threads.map(lambda key: self.block(*key), keys), strict=True))
            for i in group:
                data = b"".join(blocks[key] for key in part_keys[i])
                start, stop = spans[i]
                first_byte = start // self._block_size * self._block_size  # the byte of the file at which `data` begins
                arrays[i] = np.frombuffer(data[start - first_byte : stop - first_byte], parts[i].array.dtype)
        return [arrays[i] for i in range(len(parts))]

    def _keys(self, file: File, start: int, stop: int) -> list[tuple[File, int]]:
        """Return (file, number) for each block of a file that contains some of the bytes start to stop."""
        if start >= stop:
            return []
        # The last block is rounded up, since `stop` is exclusive.
        return [(file, number) for number in range(start // self._block_size, -(-stop // self._block_size))]

    def _block(self, file: File, number: int) -> bytes:
        """Fetch a block of a file. Raises ValueError if the file has another size than stated."""
        start = number * self._block_size
        stop = min(start + self._block_size, file.size)
        data = self._read(file.name, _WAITS + _LATER_WAITS, start=start, end=stop)
        if len(data) != stop - start:
            raise ValueError(f"{self.path}/{file.name} is damaged (not {file.size} bytes); {self.remedy}")
        return data

    def _read(self, name: str, waits: tuple[float, ...], **part: int) -> bytes:
        """Fetch a file, or its bytes `start` to `end`, with retries.

        It is called in a thread of the pool, so that a wait ends when the program ends.

        Raises:
            FileNotFoundError: If there is no such file.
            PermissionError: If access is refused.
            OSError: If all retries fail; a ConnectionError for a part of a file, since a new start may succeed.
        """
        path = f"{self.path}/{name}"
        for wait in (*waits, None):
            if _ending.is_set():
                raise OSError(f"{path} is not read any more: the program ends")
            try:
                return self._files.cat_file(f"{self._root}/{name}", **part, **self._timeout)
            except Exception as error:  # each file system has its own exceptions
                # S3 answers so to a range beyond the end; the caller finds the block too short.
                if part and isinstance(error, OSError) and error.errno == errno.EINVAL:
                    return b""
                refusal = fault(path, error)
                if isinstance(refusal, FileNotFoundError | PermissionError):
                    raise refusal from error
                # Parts are read after the store has answered once, so a ConnectionError says that a new start may succeed.
                if wait is None:
                    raise (ConnectionError(str(refusal)) if part else refusal) from error
                log.warning("%s: %s; once more in %g s", path, reason(error), wait)
                _ending.wait(wait)
        raise AssertionError


class RemoteArray:
    """A file in a bucket as an array; slices are fetched when they are read."""

    def __init__(self, folder: RemoteFolder, file: File) -> None:
        self._folder = folder
        self.file = file
        self.dtype = np.dtype(file.dtype)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Fetch the elements of a slice."""
        return self._folder.read([ArrayPart(self, part.start, part.stop)])[0]


StoredArray = np.ndarray | RemoteArray
"""A file as an array: of a local folder or of a bucket."""


class ArrayPart(NamedTuple):
    """Elements start to stop (exclusive) of an array."""

    array: StoredArray
    start: int
    stop: int


def open_folder(path: str, cache_mib: int) -> LocalFolder | RemoteFolder:
    """Open a folder: a `RemoteFolder` if the path is a URL, otherwise a `LocalFolder`."""
    if "://" in path:
        return RemoteFolder(path, cache_mib)
    return LocalFolder(path)
