"""Safetensors files: checked by the library, read a range at a time; written as a stream, with a MiB in memory.

A model is one `model.safetensors`, or shards with `model.safetensors.index.json`; Mistral's are called `consolidated`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moe_train.weights import strided
from moe_train.weights.on_disk import nbytes

INDEX = "model.safetensors.index.json"
"""Name of the index of a sharded model."""
MAX_SHARD_BYTES = 5_000_000_000
"""Default size limit of a shard."""

# Dtypes that are read; integers and float8 belong to quantized models.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file; none of it is in memory."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    """Position of its first byte in the file."""
    opened: BinaryIO

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` into memory: integers and step-1 slices of leading dims; () is the whole tensor.

        The file is read rather than mapped, since pages of a mapped file would count as this process's memory.
        """
        cuts: list[range] = []
        for entry, size in zip(index, self.shape, strict=False):  # dims without an entry are read in full
            if isinstance(entry, int):
                cuts.append(range(entry, entry + 1))
            else:
                cuts.append(range(*entry.indices(size)))
        cuts += [range(size) for size in self.shape[len(cuts) :]]
        out = np.empty([len(cut) for cut in cuts], self.dtype)
        if out.size:
            # dims from `last_cut` on are contiguous in the file
            last_cut = max((d for d, (cut, size) in enumerate(zip(cuts, self.shape, strict=True)) if len(cut) < size), default=0)
            strides = [nbytes(self.shape[d + 1 :], self.dtype) for d in range(len(self.shape))]
            for lead in itertools.product(*(range(len(cut)) for cut in cuts[:last_cut])):
                start = sum(cut[i] * stride for cut, i, stride in zip(cuts, (*lead, 0), strides))  # noqa: B905
                self._read_into(out[lead], self.offset + start)
        return out.reshape([len(cut) for d, cut in enumerate(cuts) if d >= len(index) or not isinstance(index[d], int)])

    def _read_into(self, out: np.ndarray, offset: int) -> None:
        into = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(into):  # one call returns at most 2 GiB
            count = os.preadv(self.opened.fileno(), [into[done:]], offset + done)
            if not count:
                raise ValueError(f"{self.file} is truncated: it ends inside {self.name}")
            done += count


def has_model(directory: str | Path, stem: str = "model") -> bool:
    """Return whether `open_model` would find a model to open."""
    return any(file.is_file() for file in _single_and_index(directory, stem))


def _single_and_index(directory: str | Path, stem: str) -> tuple[Path, Path]:
    return Path(directory) / f"{stem}.safetensors", Path(directory) / INDEX.replace("model", stem)


def open_model(directory: str | Path, stem: str = "model") -> dict[str, Tensor]:
    """Open the tensors of a model's directory, single file or sharded.

    Args:
        directory: the folder.
        stem: first part of the file names.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: a file is damaged or contradicts the index.
    """
    single, index = _single_and_index(directory, stem)
    if not has_model(directory, stem):
        raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}; fetch the weights")
    if not index.is_file():
        return open_file(single)
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        opened = open_file(index.parent / file)
        listed = {name for name, shard in weight_map.items() if shard == file}
        if different := sorted(listed ^ set(opened)):
            raise ValueError(f"{index} and {file} disagree about {different[0]} ({len(different)} tensors in all); fetch both")
        tensors |= opened
    return tensors


def open_file(file: Path) -> dict[str, Tensor]:
    """Open the tensors of one file, after checking its header and size.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, or a tensor has an unsupported dtype.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safetensors.safe_open(str(file), framework="numpy") as checked:  # the library checks that offsets fit the file
            names = list(checked.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    opened = file.open("rb")
    length = int.from_bytes(opened.read(8), "little")
    try:
        header = json.loads(opened.read(length), object_pairs_hook=_each_once)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    tensors = {}
    for name in names:
        entry = header[name]
        code = entry["dtype"]
        shape = entry["shape"]
        start, _ = entry["data_offsets"]
        if code not in _DTYPES:
            raise ValueError(f"{file}: {name} is {code}, read are {', '.join(_DTYPES)}; quantised models are not supported")
        tensors[name] = Tensor(name, file, tuple(shape), _DTYPES[code], 8 + length + start, opened)
    return tensors


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict of JSON pairs, refusing duplicate names.

    The library would take the last of several tensors with the same name, but which of them was meant is unknown.
    """
    header: dict[str, Any] = {}
    for name, value in pairs:
        if name in header:
            raise ValueError(f"its header has {name} twice")
        header[name] = value
    return header


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({type(error).__name__}: {error})") from error
    if invalid := sorted(str(f) for f in files if not isinstance(f, str) or Path(f).name != f or f in ("", ".", "..")):
        raise ValueError(f"{index} names {invalid[0]!r}; files of a model lie beside their index, as plain names")
    return weight_map


# --- writing -----------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Share(NamedTuple):
    """The files of a model that this process writes: every `of`th, starting with `first`."""

    first: int = 0
    of: int = 1


ALL = Share()
"""The share of a process that writes alone."""


def write_model(
    directory: Path,
    specs: Sequence[Spec],
    tensor: Callable[[Spec], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    share: Share = ALL,
) -> list[Path]:
    """Write `model-0000i-of-0000N.safetensors` and the index.

    Args:
        directory: the folder.
        specs: tensors in the order in which they are written.
        tensor: returns the array of a spec; called for one array at a time.
        max_shard_bytes: size limit of a shard.
        share: the part of one of several processes. All of them ask for all arrays in the same order, and write one file each at a
            time; the first process writes the index. An error in one is raised after all arrays were asked for, so that no other
            process waits for it.

    Returns:
        The paths of all files, the index included.
    """
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(nbytes(s.shape, s.dtype) for s in (*shards[-1], spec)) > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    files = [directory / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    errors = []
    for first in range(0, len(shards), share.of):
        if share.of == 1:
            write_file(files[first], shards[first], tensor)
            continue
        together = shards[first : first + share.of]
        own_index = share.first if share.first < len(together) else None
        # Interleaved (the k-th tensor of each file in turn), so that all processes write at the same time.
        in_order: list[tuple[int, Spec]] = []
        for kth_specs in itertools.zip_longest(*together):
            in_order += [(i, spec) for i, spec in enumerate(kth_specs) if spec is not None]
        requested = ((i == own_index, tensor(spec)) for i, spec in in_order)
        try:
            if own_index is not None:
                mine_alone = (x for is_own, x in requested if is_own)
                write_file(files[first + own_index], together[own_index], lambda spec, mine_alone=mine_alone: next(mine_alone))  # type: ignore[misc]
        except OSError as error:
            errors.append(error)
        for _ in requested:  # the remaining arrays belong to other processes, but asking for them is collective
            pass
    if errors:
        raise errors[0]
    index = {
        "metadata": {"total_size": sum(nbytes(s.shape, s.dtype) for s in specs)},
        "weight_map": {spec.name: file.name for file, shard in zip(files, shards, strict=True) for spec in shard},
    }
    index_path = directory / INDEX.format(stem="model")
    if share.first == 0:
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, index_path]


def write_file(file: Path, specs: Iterable[Spec], tensor: Callable[[Spec], np.ndarray]) -> None:
    """Write one safetensors file: u64 length of the header, the header in JSON, then the tensors back to back."""
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects a file without it
    offset = 0
    for spec in specs:
        end = offset + nbytes(spec.shape, spec.dtype)
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format requires
    try:
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                array = tensor(spec)
                assert array.shape == spec.shape and array.dtype == spec.dtype, (spec, array.shape, array.dtype)
                for part in strided.parts(array):
                    out.write(part.reshape(-1).view(np.uint8).data)
    except OSError as error:
        error.filename = error.filename or str(file)  # a failed write does not state its file
        raise
