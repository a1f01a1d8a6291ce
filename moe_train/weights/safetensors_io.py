"""Safetensors files: read by the library, a range at a time; written as a stream, one tensor in memory.

A model is one `model.safetensors`, or shards with `model.safetensors.index.json`; Mistral's are called `consolidated`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moe_train.weights import strided
from moe_train.weights.on_disk import nbytes

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

# Formats of weights that we read; integers and float8 belong to quantised models.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file; nothing of it is in memory."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    slices: Any

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The part at `index` (integers and step-1 slices of leading dims; () is all of it), copied into memory."""
        return self.slices[index or (slice(None),) * len(self.shape)]


def has_model(directory: str | Path, stem: str = "model") -> bool:
    """Whether `open_model` finds something to open."""
    return any(file.is_file() for file in _single_and_index(directory, stem))


def _single_and_index(directory: str | Path, stem: str) -> tuple[Path, Path]:
    return Path(directory) / f"{stem}.safetensors", Path(directory) / INDEX.replace("model", stem)


def open_model(directory: str | Path, stem: str = "model") -> dict[str, Tensor]:
    """The tensors of a model's directory, single file or sharded.

    Raises FileNotFoundError where there is none, ValueError where a file is damaged or contradicts the index.
    """
    single, index = _single_and_index(directory, stem)
    if not has_model(directory, stem):
        raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}; fetch the weights")
    if not index.is_file():
        return open_file(single)
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        found = open_file(index.parent / file)
        listed = {name for name, at in weight_map.items() if at == file}
        if different := sorted(listed ^ set(found)):
            raise ValueError(f"{index} and {file} disagree about {different[0]} ({len(different)} tensors in all); fetch both")
        tensors |= found
    return tensors


def open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, its header and size checked."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        handle = safetensors.safe_open(str(file), framework="numpy")
        slices = {name: handle.get_slice(name) for name in list(handle.keys())}
        headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    for name, (_, code) in headers.items():
        if code not in _DTYPES:
            raise ValueError(f"{file}: {name} is {code}, read are {', '.join(_DTYPES)}; quantised models are not supported")
    return {name: Tensor(name, file, shape, _DTYPES[code], slices[name]) for name, (shape, code) in headers.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({type(error).__name__}: {error})") from error
    if foreign := sorted(str(f) for f in files if not isinstance(f, str) or Path(f).name != f or f in ("", ".", "..")):
        raise ValueError(f"{index} names {foreign[0]!r}; files of a model lie beside their index, as plain names")
    return weight_map


# --- writing -----------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def write_model(
    directory: Path, specs: Sequence[Spec], tensor: Callable[[Spec], np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write `model-0000i-of-0000N.safetensors` and the index; `tensor` is asked for one array at a time."""
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(nbytes(s.shape, s.dtype) for s in (*shards[-1], spec)) > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    files = [directory / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(file, shard, tensor)
    index = {
        "metadata": {"total_size": sum(nbytes(s.shape, s.dtype) for s in specs)},
        "weight_map": {spec.name: file.name for file, shard in zip(files, shards, strict=True) for spec in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, directory / INDEX]


def write_file(file: Path, specs: Iterable[Spec], tensor: Callable[[Spec], np.ndarray]) -> None:
    """One safetensors file: u64 length of the header, the header in JSON, then the tensors back to back."""
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for spec in specs:
        end = offset + nbytes(spec.shape, spec.dtype)
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format asks
    try:
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                array = tensor(spec)
                assert array.shape == spec.shape and array.dtype == spec.dtype, (spec, array.shape, array.dtype)
                for part in strided.parts(array):
                    out.write(part.reshape(-1).view(np.uint8).data)
    except OSError as error:
        error.filename = error.filename or str(file)  # a failed write does not know its file
        raise
