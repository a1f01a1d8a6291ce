"""Files of a folder, here or in a bucket, as arrays that are read where they are needed.

A local file is memory-mapped. Of a file in a bucket (any file system of fsspec: gs://, s3://, …) blocks are fetched by
range, and the last ones used stay in memory, up to a bound.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_REQUESTS = 16  # at once
_WAITS = 1.0, 5.0, 25.0  # seconds before what failed is read again


class Local:
    """A folder of this machine."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def text(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        """The file as an array. Raises ValueError where it has not `size` bytes."""
        file = self.path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} is damaged (not {size} bytes); remove {self.path}, and prepare the data again")
        return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray) if size else np.zeros(0, dtype)

    whole = array


class Remote:
    """A folder of a bucket; `cache_mib`: of its files in memory at most."""

    def __init__(self, url: str, cache_mib: int, block: int = _BLOCK) -> None:
        import fsspec

        self.path = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be opened: {' '.join(str(error).split())}") from error
        self._size = block
        self.block = functools.lru_cache(max(1, (cache_mib << 20) // block))(self._block)
        self._threads = ThreadPoolExecutor(_REQUESTS, "range")

    def _block(self, name: str, number: int, size: int) -> bytes:
        start = number * self._size
        found = self._read(name, start, min(start + self._size, size))
        if len(found) != min(self._size, size - start):
            raise ValueError(f"{self.path}/{name} is damaged (not {size} bytes); copy the prepared data there again")
        return found

    def _read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Raises FileNotFoundError, and OSError for what goes wrong again and again."""
        for wait in (*_WAITS, None):
            try:
                return self._files.cat_file(f"{self._root}/{name}", start=start, end=stop)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.path}/{name} is missing") from error
            except Exception as error:  # each file system has its own
                reason = " ".join(str(error).split()) or type(error).__name__
                if wait is None or isinstance(error, PermissionError):
                    raise OSError(f"{self.path}/{name} cannot be read: {reason}") from error
                log.warning("%s/%s: %s; once more in %g s", self.path, name, reason, wait)
                time.sleep(wait)
        raise AssertionError

    def text(self, name: str) -> bytes:
        return self._read(name)

    def array(self, name: str, dtype: str, size: int) -> Ranges:
        return Ranges(self, name, np.dtype(dtype), size)

    def whole(self, name: str, dtype: str, size: int) -> np.ndarray:
        """The file as an array in memory, fetched at once. Raises ValueError where it has not `size` bytes."""
        found = self._read(name)
        if len(found) != size:
            raise ValueError(f"{self.path}/{name} is damaged (not {size} bytes); copy the prepared data there again")
        return np.frombuffer(found, dtype)

    def fetch(self, parts: Iterable[tuple[Ranges, int, int]]) -> None:
        """Fetch what elements start to stop of arrays need, several blocks at a time."""
        wanted = {(array.name, number, array.size) for array, a, b in parts for number in self.numbers(*array.bytes(a, b))}
        for _ in self._threads.map(lambda block: self.block(*block), sorted(wanted)):
            pass

    def numbers(self, start: int, stop: int) -> range:
        """Of the blocks that hold bytes start to stop."""
        return range(start // self._size, -(-stop // self._size))

    def read(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes start to stop of a file."""
        numbers = self.numbers(start, stop)
        found = [self.block(name, number, size) for number in numbers]
        return b"".join(found)[start - numbers.start * self._size :][: stop - start]


class Ranges:
    """A file of a bucket, of `size` bytes, as an array of which slices are read."""

    def __init__(self, folder: Remote, name: str, dtype: np.dtype, size: int) -> None:
        self._folder, self.name, self._dtype, self.size = folder, name, dtype, size

    def bytes(self, start: int, stop: int) -> tuple[int, int]:
        return start * self._dtype.itemsize, stop * self._dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.frombuffer(self._folder.read(self.name, *self.bytes(part.start, part.stop), self.size), self._dtype)


def open_folder(path: str, cache_mib: int) -> Local | Remote:
    """`Remote` where the path is a URL."""
    return Remote(path, cache_mib) if "://" in path else Local(path)
