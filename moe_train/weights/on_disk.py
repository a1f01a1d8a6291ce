"""Somebody's model in files: its architecture, its names and its tensors, nothing of it in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.weights.names import Piece

CHUNK = 2**22
"""Bytes that are hashed together: of much more the system would give and take back the memory each time."""


class Tensor(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The part at `index` (integers and step-1 slices of leading dims; () is all of it), copied into memory."""
        ...


class Weights(NamedTuple):
    """A model that lies on disk."""

    where: Path
    model: config.Model
    table: list[Piece]
    tensors: Mapping[str, Tensor]
    """Those of the text model alone."""

    @property
    def dtype(self) -> config.Dtype | None:
        """The dtype of all tensors; None where they have several, or one that is not written here."""
        found = {tensor.dtype.name for tensor in self.tensors.values()}
        for dtype in get_args(config.Dtype):
            if found == {dtype}:
                return dtype
        return None


def nbytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of each tensor's dtype, shape and bytes, by name; several at a time, each in parts of 4 MiB."""

    total_bytes = sum(nbytes(tensor.shape, tensor.dtype) for tensor in tensors.values())
    hashed = progress.counted("hashing the base", total_bytes, "bytes")

    def digest(tensor: Tensor) -> str:
        total = hashlib.sha256(f"{tensor.dtype.name} {tensor.shape}".encode())
        (length, *row) = tensor.shape or (0,)
        step = max(1, CHUNK // max(1, nbytes(row, tensor.dtype)))
        for start in range(0, length, step):
            total.update(np.ascontiguousarray(tensor.read((slice(start, min(start + step, length)),))).view(np.uint8).data)
        hashed(nbytes(tensor.shape, tensor.dtype))
        return total.hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
