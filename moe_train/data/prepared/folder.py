"""The files of a folder, here or in a bucket, as arrays that are read where they are needed.

A local file is memory-mapped. A file in a bucket is fetched by range, block by block, and the blocks used last stay in memory,
up to a bound.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.prepared.bucket import PATIENCE, fault, open_files, reason

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_REQUESTS = 16  # in flight at once
_WAITS = 1.0, 5.0, 25.0  # seconds before what failed is read again
_LATER_WAITS = 60.0, 120.0, 240.0  # after these, where the store has answered before, so that a run outlives its restart

_ending = threading.Event()
"""Set when the interpreter begins to end, before it waits for the threads of pools, which `atexit` comes after."""
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


class File(NamedTuple):
    """A file of a prepared set: its name in the folder, the dtype of its numbers, and its size in bytes."""

    name: str
    dtype: str
    size: int


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def text(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def array(self, file: File) -> np.ndarray:
        """The file as an array. Raises ValueError where it has another size."""
        path = self.path / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            raise ValueError(f"{path} is damaged (not {file.size} bytes); remove {self.path}, and prepare the data again")
        if not file.size:
            return np.zeros(0, file.dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype=file.dtype, mode="r").view(np.ndarray)

    def read_whole(self, files: Sequence[File]) -> list[np.ndarray]:
        return [self.array(file) for file in files]

    def read(self, parts: Sequence[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
        """Elements start to stop of arrays."""
        return [array[start:stop] for array, start, stop in parts]


class RemoteFolder:
    """A folder of a bucket, of whose files at most `cache_mib` stay in memory."""

    def __init__(self, url: str, cache_mib: int, block: int = _BLOCK) -> None:
        self.path = url
        self._files, self._root = open_files(url)
        self._timeout = {"timeout": PATIENCE} if self._files.async_impl else {}
        self._block_size = block
        self.cache_bytes = cache_mib << 20
        self._max_blocks = max(1, self.cache_bytes // block)
        self.block = functools.lru_cache(self._max_blocks)(self._block)
        self._threads = ThreadPoolExecutor(_REQUESTS, "range")

    def text(self, name: str) -> bytes:
        return self._threads.submit(self._read, name, _WAITS).result()

    def array(self, file: File) -> RemoteArray:
        return RemoteArray(self, file)

    def read_whole(self, files: Sequence[File]) -> list[np.ndarray]:
        """Files as arrays in memory, without a part of them in the cache. Raises ValueError where one has another size."""
        keys = [[(file, number) for number in self._numbers(0, file.size)] for file in files]
        blocks = self._threads.map(lambda key: self._block(*key), itertools.chain(*keys))
        return [np.frombuffer(b"".join(next(blocks) for _ in mine), file.dtype) for file, mine in zip(files, keys, strict=True)]

    def read(self, parts: Sequence[tuple[RemoteArray, int, int]]) -> list[np.ndarray]:
        """Elements start to stop of arrays. Their blocks are fetched several at a time, and no more of them than the cache
        holds, so that each is fetched once."""
        spans = [(array.file, a * array.dtype.itemsize, b * array.dtype.itemsize) for array, a, b in parts]
        wanted = [[(file, number) for number in self._numbers(start, stop)] for file, start, stop in spans]
        found: dict[int, np.ndarray] = {}
        todo = sorted(range(len(parts)), key=wanted.__getitem__, reverse=True)  # neighbours together
        while todo:
            group = [todo.pop()]
            keys = dict.fromkeys(wanted[group[0]])
            while todo and len(more := keys | dict.fromkeys(wanted[todo[-1]])) <= self._max_blocks:
                keys = more
                group.append(todo.pop())
            blocks = dict(zip(keys, self._threads.map(lambda key: self.block(*key), keys), strict=True))
            for i in group:
                data = b"".join(blocks[key] for key in wanted[i])
                _, start, stop = spans[i]
                start, stop = start % self._block_size, stop - start // self._block_size * self._block_size
                found[i] = np.frombuffer(data[start:stop], parts[i][0].dtype)
        return [found[i] for i in range(len(parts))]

    def _numbers(self, start: int, stop: int) -> range:
        """Numbers of the blocks that hold bytes start to stop."""
        return range(start // self._block_size, -(-stop // self._block_size)) if start < stop else range(0)

    def _block(self, file: File, number: int) -> bytes:
        start = number * self._block_size
        stop = min(start + self._block_size, file.size)
        found = self._read(file.name, _WAITS + _LATER_WAITS, start=start, end=stop)
        if len(found) != stop - start:
            raise ValueError(f"{self.path}/{file.name} is damaged (not {file.size} bytes); copy the prepared data there again")
        return found

    def _read(self, name: str, waits: tuple[float, ...], **part: int) -> bytes:
        """A file, or bytes `start` to `end` of it. Called in a thread of the pool, so that the end of the program ends a wait.

        Raises FileNotFoundError, PermissionError, and OSError for what goes wrong again and again: of a part ConnectionError.
        """
        path = f"{self.path}/{name}"
        for wait in (*waits, None):
            if _ending.is_set():
                raise OSError(f"{path} is not read any more: the program ends")
            try:
                return self._files.cat_file(f"{self._root}/{name}", **part, **self._timeout)
            except Exception as error:  # each file system has its own
                if part and isinstance(error, OSError) and error.errno == errno.EINVAL:
                    return b""  # how S3 answers a range behind the end
                refusal = fault(path, error)
                if isinstance(refusal, FileNotFoundError | PermissionError):
                    raise refusal from error
                if wait is None:  # a store that has answered before is worth starting again for
                    raise (ConnectionError(str(refusal)) if part else refusal) from error
                log.warning("%s: %s; once more in %g s", path, reason(error), wait)
                _ending.wait(wait)
        raise AssertionError


class RemoteArray:
    """A file of a bucket as an array of which slices are read."""

    def __init__(self, folder: RemoteFolder, file: File) -> None:
        self._folder, self.file, self.dtype = folder, file, np.dtype(file.dtype)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._folder.read([(self, part.start, part.stop)])[0]


def open_folder(path: str, cache_mib: int) -> LocalFolder | RemoteFolder:
    """`RemoteFolder` where the path is a URL."""
    return RemoteFolder(path, cache_mib) if "://" in path else LocalFolder(path)
