"""Safetensors files: checked by the library, read a range at a time; written as a stream, with a MiB in memory.

A model is one `model.safetensors`, or shards with `model.safetensors.index.json`; Mistral's are called `consolidated`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moe_train.weights import strided
from moe_train.weights.on_disk import array_bytes

INDEX_FILE = "model.safetensors.index.json"
"""Name of the index of a sharded model."""
MAX_SHARD_BYTES = 5_000_000_000
"""Default size limit of a shard."""

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that are read; integers and other kinds of float8 belong to quantized models that are not supported."""
_QUANTIZED = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Dtypes of values that mean nothing without the scales next to them."""
_CARRIED = {
    **_DTYPES,
    **_QUANTIZED,
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype(np.bool_),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
"""Dtypes of tensors that are only carried from one file into another."""
_CODES = {dtype: code for code, dtype in _CARRIED.items()}


@dataclass(frozen=True)
class SafetensorsTensor:
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
        kept_dims: list[int] = []  # an integer in the index drops its dim
        for d, size in enumerate(self.shape):
            entry = index[d] if d < len(index) else slice(None)
            if isinstance(entry, int):
                cuts.append(range(entry, entry + 1))
            else:
                cuts.append(range(*entry.indices(size)))
                kept_dims.append(d)
        out = np.empty([len(cut) for cut in cuts], self.dtype)
        if out.size:
            self._read_cuts(out, cuts)
        return out.reshape([len(cuts[d]) for d in kept_dims])

    def _read_cuts(self, out: np.ndarray, cuts: list[range]) -> None:
        """Read the ranges `cuts` of all dims, one contiguous part of the file at a time."""
        last_cut = 0
        for d, size in enumerate(self.shape):
            if len(cuts[d]) < size:
                last_cut = d
        strides = [array_bytes(self.shape[d + 1 :], self.dtype) for d in range(len(self.shape))]
        # Dims after `last_cut` are read in full, so the range of `last_cut` is contiguous for each entry of the dims before it.
        for lead in itertools.product(*(range(len(cut)) for cut in cuts[:last_cut])):
            start = self.offset
            for cut, i, stride in zip(cuts, (*lead, 0), strides, strict=False):
                start += cut[i] * stride
            # With an ellipsis, since NumPy copies a scalar that is indexed by () alone.
            index: tuple[Any, ...] = (*lead, ...)
            self._read_into(out[index], start)

    def _read_into(self, out: np.ndarray, offset: int) -> None:
        # As bytes, since Python's buffer protocol has no bfloat16.
        destination = out.reshape(-1).view(np.uint8).data
        num_read = 0
        while num_read < len(destination):  # one call returns at most 2 GiB
            # Positioned, since threads that read other tensors share the descriptor and would move a common position.
            count = os.preadv(self.opened.fileno(), [destination[num_read:]], offset + num_read)
            if not count:
                raise ValueError(f"{self.file} is truncated: it ends inside the tensor {self.name}; download it again")
            num_read += count


def has_model(directory: str | Path, stem: str = "model") -> bool:
    """Return whether `open_model_tensors` would find a model to open."""
    return any(file.is_file() for file in _single_and_index(directory, stem))


_PICKLES = {
    "pytorch_model*.bin": "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out) in transformers",
    "adapter_model.bin": "PeftModel.from_pretrained(base, folder).save_pretrained(out) in PEFT",
    "consolidated*.pth": "safetensors.torch.save_file(torch.load(file, weights_only=True), 'consolidated.safetensors')",
}
"""Files of weights that are not read, and what converts them to safetensors."""


def _refuse_pickle(directory: Path) -> None:
    """Raise ValueError if a folder without safetensors has the same weights as a pickle."""
    for pattern, conversion in _PICKLES.items():
        if files := sorted(directory.glob(pattern)):
            raise ValueError(
                f"{files[0]} is a pickle, a format that is not read, since loading it can run code; convert it: {conversion}"
            )


def _single_and_index(directory: str | Path, stem: str) -> tuple[Path, Path]:
    """Return the paths of a model in a single file and of the index of a sharded one."""
    return Path(directory) / f"{stem}.safetensors", Path(directory) / INDEX_FILE.replace("model", stem)


def _is_never_carried(name: str) -> bool:
    return False


def open_model_tensors(
    directory: str | Path, stem: str = "model", is_carried: Callable[[str], bool] = _is_never_carried
) -> dict[str, SafetensorsTensor]:
    """Open the tensors of a model's directory, single file or sharded.

    FP8 tensors are returned as they are stored; `fp8.dequantize_tensors` joins them with their scales.

    Args:
        directory: the folder.
        stem: first part of the file names.
        is_carried: whether the tensor of a name is only carried into other files, and so may have any dtype.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: a file is damaged or contradicts the index.
    """
    single, index = _single_and_index(directory, stem)
    if not has_model(directory, stem):
        _refuse_pickle(Path(directory))
        if any(Path(directory).glob(f"{stem}-*.safetensors")):
            raise FileNotFoundError(f"{directory} has shards of a model, but not their index {index.name}; download it")
        raise FileNotFoundError(f"{directory} has neither {single.name} nor {index.name}; download the weights")
    if not index.is_file():
        return open_safetensors(single, _DTYPES | _QUANTIZED, is_carried)
    weight_map = _weight_map(index)
    tensors: dict[str, SafetensorsTensor] = {}
    for file in sorted(set(weight_map.values())):
        opened = open_safetensors(index.parent / file, _DTYPES | _QUANTIZED, is_carried)
        listed = {name for name, shard in weight_map.items() if shard == file}
        if different := sorted(listed ^ set(opened)):
            raise ValueError(
                f"{index} and {file} disagree about {different[0]} ({len(different)} tensors in all); download both again"
            )
        tensors |= opened
    return tensors


def open_safetensors(
    file: Path, dtypes: Mapping[str, np.dtype] = _DTYPES, is_carried: Callable[[str], bool] = _is_never_carried
) -> dict[str, SafetensorsTensor]:
    """Open the tensors of one file, after checking its header and size.

    Args:
        file: the file.
        dtypes: the dtypes that are accepted, by their names in the format; by default those of unquantized tensors.
        is_carried: see `open_model_tensors`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, or a tensor has an unsupported dtype.
    """
    if not file.is_file():
        _refuse_pickle(file.parent)
        raise FileNotFoundError(f"{file} is missing; download it")
    try:
        with safetensors.safe_open(str(file), framework="numpy") as checked:  # the library checks that offsets fit the file
            names = list(checked.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}; download it again") from error
    # Stays open as long as one of its tensors is referenced.
    opened = file.open("rb")
    length = int.from_bytes(opened.read(8), "little")
    try:
        header = json.loads(opened.read(length), object_pairs_hook=_each_once)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    tensors = {}
    # The library's names do not include __metadata__, which is no tensor.
    for name in names:
        entry = header[name]
        code = entry["dtype"]
        shape = entry["shape"]
        # Offsets count from the end of the header: 8 bytes for its length, then its text.
        start, _ = entry["data_offsets"]
        accepted = _CARRIED if is_carried(name) else dtypes
        if code not in accepted:
            supported = ", ".join(accepted)
            raise ValueError(
                f"{file}: {name} has dtype {code}; supported: {supported}; of quantized models only FP8 (e4m3) is read: fetch the "
                "BF16 or FP8 release, or save the weights in bfloat16"
            )
        tensors[name] = SafetensorsTensor(name, file, tuple(shape), accepted[code], 8 + length + start, opened)
    return tensors


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict of JSON pairs, refusing duplicate names.

    The library would take the last of several tensors with the same name, but which of them was meant is unknown.
    """
    header: dict[str, Any] = {}
    for name, value in pairs:
        if name in header:
            raise ValueError(f"the header has {name} twice; download the file again")
        header[name] = value
    return header


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of safetensors files ({type(error).__name__}: {error}); download it again"
        ) from error
    # A path with folders in it could lead out of the model's folder.
    if invalid := sorted(str(f) for f in files if not isinstance(f, str) or Path(f).name != f or f in ("", ".", "..")):
        raise ValueError(f"{index} names the file {invalid[0]!r}; shards must be plain names of files in the folder of the index")
    return weight_map


# --- writing -----------------------------------------------------------------------------------------------------


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


TensorValues = np.ndarray | Iterator[np.ndarray]
"""Values of a tensor to be written: an array of its shape, or its consecutive parts in the order of the file."""


class WriterShare(NamedTuple):
    """The files of a model that this process writes: every `of`th, starting with `first`."""

    first: int = 0
    of: int = 1


SOLE_WRITER = WriterShare()
"""The share of a process that writes alone."""


def write_shards(
    directory: Path,
    specs: Sequence[TensorSpec],
    tensor: Callable[[TensorSpec], TensorValues],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    share: WriterShare = SOLE_WRITER,
) -> list[Path]:
    """Write `model-0000i-of-0000N.safetensors` and the index.

    Args:
        directory: the folder.
        specs: tensors in the order in which they are written.
        tensor: returns the values of a spec; called for one tensor at a time.
        max_shard_bytes: size limit of a shard.
        share: the part of one of several processes. All of them ask for all arrays in the same order, and write one file each at a
            time; the first process writes the index. An error in one is raised after all arrays were asked for, so that no other
            process waits for it.

    Returns:
        The paths of all files, the index included.
    """
    shards = _divide_into_shards(specs, max_shard_bytes)
    files = [directory / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    errors: list[OSError] = []
    for first in range(0, len(shards), share.of):
        if share.of == 1:
            write_safetensors(files[first], shards[first], tensor)
            continue
        group = slice(first, first + share.of)
        error = _write_own_shard(files[group], shards[group], share.first, tensor)
        if error is not None:
            errors.append(error)
    if errors:
        raise errors[0]
    index = {
        "metadata": {"total_size": sum(array_bytes(s.shape, s.dtype) for s in specs)},
        "weight_map": {spec.name: file.name for file, shard in zip(files, shards, strict=True) for spec in shard},
    }
    index_path = directory / INDEX_FILE
    if share.first == 0:
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, index_path]


def _divide_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors into consecutive shards of at most `max_shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    shard_bytes = 0
    for spec in specs:
        tensor_bytes = array_bytes(spec.shape, spec.dtype)
        if shards[-1] and shard_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(spec)
        shard_bytes += tensor_bytes
    return shards


def _write_own_shard(
    files: Sequence[Path],
    shards: Sequence[Sequence[TensorSpec]],
    own_index: int,
    tensor: Callable[[TensorSpec], TensorValues],
) -> OSError | None:
    """Write one of the shards that the processes write at the same time, one each.

    All processes ask for the arrays of all these shards in the same order. An error in writing is therefore returned rather than
    raised, after every array was asked for.
    """
    # The k-th tensor of each shard in turn, so that all processes have something to write at any time.
    in_order: list[tuple[int, TensorSpec]] = []
    for kth_specs in itertools.zip_longest(*shards):
        in_order += [(i, spec) for i, spec in enumerate(kth_specs) if spec is not None]
    own_values = _own_values(in_order, own_index, tensor)
    write_error = None
    if own_index < len(shards):
        try:
            write_safetensors(files[own_index], shards[own_index], lambda spec: next(own_values))
        except OSError as error:
            write_error = error
    # What remains belongs to other processes, but asking for it is collective; after an error, own tensors remain too.
    for values in own_values:
        _drop(values)
    return write_error


def _own_values(
    in_order: Iterable[tuple[int, TensorSpec]], own_index: int, tensor: Callable[[TensorSpec], TensorValues]
) -> Iterator[TensorValues]:
    """Yield the values of the own tensors; those of other processes are computed and dropped on the way to the next one."""
    for i, spec in in_order:
        values = tensor(spec)
        if i == own_index:
            yield values
        _drop(values)  # parts that an error has left unread, or all of them


def _drop(values: TensorValues) -> None:
    """Compute parts that are not written."""
    if not isinstance(values, np.ndarray):
        for _ in values:
            pass


def write_safetensors(file: Path, specs: Iterable[TensorSpec], tensor: Callable[[TensorSpec], TensorValues]) -> None:
    """Write one safetensors file: u64 length of the header, the header in JSON, then the tensors back to back."""
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects a file without it
    offset = 0
    for spec in specs:
        end = offset + array_bytes(spec.shape, spec.dtype)
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format requires
    try:
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                for array in _checked_parts(spec, tensor(spec)):
                    for part in strided.contiguous_parts(array):
                        out.write(part.reshape(-1).view(np.uint8).data)
    except OSError as error:
        error.filename = error.filename or str(file)  # a failed write does not state its file
        raise


def _checked_parts(spec: TensorSpec, values: TensorValues) -> Iterator[np.ndarray]:
    """Yield the parts of a tensor, and check that they fill it."""
    if isinstance(values, np.ndarray):
        assert values.shape == spec.shape and values.dtype == spec.dtype, (spec, values.shape, values.dtype)
        yield values
        return
    size = 0
    for part in values:
        assert part.dtype == spec.dtype and part.shape[1:] == spec.shape[-part.ndim :][1:], (spec, part.shape, part.dtype)
        size += part.size
        yield part
    assert size == math.prod(spec.shape), (spec, size)
