"""A model in files: its architecture, names and tensors, none of which are in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.weights.names import WeightPiece
from moe_train.weights.wrappers.classes import WrapperClass
from moe_train.weights.wrappers.towers import PixtralSettings
from moe_train.weights.wrappers.whisper import WhisperSettings

FloatDtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes of the numbers in files."""
FileDtype = Literal["float32", "bfloat16", "float16", "fp8"]
"""Dtypes of safetensors files: of all tensors, or of linear maps alone (fp8)."""
HASH_CHUNK_BYTES = 2**22
"""Bytes that are hashed at once; with much more, the system would allocate and free the memory each time."""


class FileTensor(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str:
        """Name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in numpy's order of dims."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of what `read` returns."""
        ...

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` into memory: integers and step-1 slices of leading dims; () is the whole tensor."""
        ...


class StoredTensor(FileTensor, Protocol):
    """A tensor in a file, with its file."""

    @property
    def file(self) -> object:
        """The file, for messages."""
        ...


class Carried(NamedTuple):
    """The parts of a multimodal model around its text model. Exports carry unchanged what of them is not trained."""

    parts: str
    """What they are, for messages: vision tower and projector."""
    layout: Literal["hf", "mistral"]
    """Layout of the files."""
    wrapper: WrapperClass | None
    """The class in transformers; None in Mistral's own layout, which names none."""
    fields: JsonObject
    """The whole config.json or params.json."""
    settings: PixtralSettings | WhisperSettings
    """Sizes of the tower and the projector."""
    tensors: Mapping[str, StoredTensor]
    """Tensors by name, of any dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array_bytes(tensor.shape, tensor.dtype) for tensor in self.tensors.values())

    @property
    def description(self) -> str:
        """What they are, how many tensors and how many bytes, for messages."""
        return f"{self.parts} ({len(self.tensors)} tensors, {self.nbytes / 1e9:.3g} GB)"


class WeightFiles(NamedTuple):
    """A model on disk, opened without reading its tensors."""

    path: Path
    """The file or folder, for messages."""
    model: config.Model
    pieces: list[WeightPiece]
    """Location of each weight in the files."""
    tensors: Mapping[str, FileTensor]
    """Tensors of the text model only, by name."""
    carried: Carried | None = None
    """The other parts of a multimodal model; None for a text model."""

    @property
    def dtype(self) -> FloatDtype | None:
        """The dtype of all tensors but the routers' biases, which are always float32.

        None if they have several, or one that this package does not write.
        """
        biases = {piece.name for piece in self.pieces if ParameterPath.parse(piece.path).is_router_bias}
        dtypes = {tensor.dtype.name for name, tensor in self.tensors.items() if name not in biases}
        for dtype in get_args(FloatDtype):
            if dtypes == {dtype}:
                return dtype
        return None


def array_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Return the bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def have_same_content(a: FileTensor, b: FileTensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    hashes = hash_tensors({"a": a, "b": b})
    return hashes["a"] == hashes["b"]


def hash_tensors(tensors: Mapping[str, FileTensor]) -> dict[str, str]:
    """Return the sha256 of each tensor's dtype, shape and bytes, by name; several tensors at a time, each in parts of 4 MiB."""
    total_bytes = sum(array_bytes(tensor.shape, tensor.dtype) for tensor in tensors.values())
    report_hashed = progress.counted("hashing the base", total_bytes, "bytes")

    def digest(tensor: FileTensor) -> str:
        """Hash one tensor, a chunk of rows at a time."""
        # The same bytes with another dtype or shape are another tensor.
        total = hashlib.sha256(f"{tensor.dtype.name} {tensor.shape}".encode())
        if not tensor.shape:  # a scalar has no rows
            total.update(np.atleast_1d(tensor.read(())).view(np.uint8).data)
        (length, *row) = tensor.shape or (0,)
        step = max(1, HASH_CHUNK_BYTES // max(1, array_bytes(row, tensor.dtype)))
        for start in range(0, length, step):
            rows = tensor.read((slice(start, min(start + step, length)),))
            # As bytes, since Python's buffer protocol has no bfloat16.
            total.update(np.ascontiguousarray(rows).view(np.uint8).data)
        report_hashed(array_bytes(tensor.shape, tensor.dtype))
        return total.hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
