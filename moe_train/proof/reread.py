"""Read files of weights as a second, plain reader: headers are parsed here, bytes are read with `pread`, nothing is mapped.

This module is for the proof alone and shares no code with what writes or loads the files.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOAT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Kinds of tensors whose numbers are stored one by one."""
Q8_0 = np.dtype([("scale", "<f2"), ("q", "i1", 32)])
"""A block of 32 numbers: scale * q."""
FP8 = "FP8"
"""Kind of a tensor of e4m3 numbers that was joined with its scales; `proof.fp8` decodes it."""
SCALE_BLOCK = 128
"""Outputs, and inputs, that share a scale of an FP8 tensor with several scales."""
_IN_TOWER = re.compile(r"(model\.)?(vision_|audio_tower|multi_modal_projector|patch_merger|mm_whisper_embeddings)")
"""Beginning of the names of the tensors of a tower and projector."""
_SCALE_NAMES = ("weight_scale_inv", "qscale_weight")
"""What takes the place of `weight` in the names of scales: in Hugging Face's layout and in Mistral's."""
_FUSED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
"""Ends of the names of tensors that all experts of a layer share; `_scale_inv` follows in the names of their scales."""
_GGUF_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
"""ggml's code of a type -> (name, numbers per block, bytes per block)."""
_GGUF_STRING = 8
_GGUF_ARRAY = 9
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's code of a scalar's type -> its format in `struct`."""


class Stored(NamedTuple):
    """A tensor in a file, as rows of its last dim; a vector is one row."""

    name: str
    file: Path
    kind: str
    """F32, F16, BF16, Q8_0, FP8, or whatever else the file states."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scales: Stored | None = None
    """The scales of a tensor of kind FP8."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    def read(self, descriptor: int, start: int, stop: int) -> bytearray:
        """Read the bytes of rows `start` to `stop` from an open file descriptor. Raises ValueError if the file ends before."""
        row_bytes = self.nbytes // max(1, self.rows)
        buffer = bytearray((stop - start) * row_bytes)
        num_read = 0
        while num_read < len(buffer):  # one call returns at most 2 GiB
            count = os.preadv(descriptor, [memoryview(buffer)[num_read:]], self.offset + start * row_bytes + num_read)
            if not count:
                raise ValueError(f"{self.file} ends inside {self.name}; copy the file again")
            num_read += count
        return buffer


def tensors(directory: Path) -> dict[str, Stored]:
    """Read the headers of the .safetensors and .gguf files in a directory.

    Returns:
        Every tensor by name; FP8 ones are joined with their scales.

    Raises:
        ValueError: a file cannot be read, has bytes that belong to no tensor or to two, or a name is given twice.
    """
    files: list[Path] = []
    for file in sorted(directory.iterdir()):
        # llama.cpp's file of a vision or audio tower holds no tensor of the model, and names of its own.
        if file.suffix == ".safetensors" or (file.suffix == ".gguf" and "mmproj" not in file.name.lower()):
            files.append(file)
    return _with_scales(tensors_of_files(files))


def tensors_of_files(files: Sequence[Path]) -> dict[str, Stored]:
    """Like `tensors`, for these files; scales of FP8 tensors are tensors of their own."""
    by_name: dict[str, Stored] = {}
    for file in files:
        try:
            stored = list(_safetensors(file) if file.suffix == ".safetensors" else _gguf(file)[1])
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from error
        for tensor in stored:
            if tensor.name in by_name:
                raise ValueError(f"{tensor.name} is in {by_name[tensor.name].file.name} and in {file.name}")
            by_name[tensor.name] = tensor
    return by_name


def _with_scales(by_name: dict[str, Stored]) -> dict[str, Stored]:
    """Join FP8 tensors with their scales, which are no tensors of their own then. What does not fit is left as it is."""
    joined = dict(by_name)
    for name, tensor in by_name.items():
        # A tower is carried tensor by tensor, so its scales are tensors like any other.
        if tensor.kind != "F8_E4M3" or _IN_TOWER.match(name):
            continue
        candidates: list[str] = []
        if name.endswith(".weight"):
            candidates = [name.removesuffix("weight") + scale_name for scale_name in _SCALE_NAMES]
        elif name.endswith(_FUSED_EXPERTS):
            candidates = [f"{name}_scale_inv"]
        shapes = (scale_shape(tensor, in_blocks=False), scale_shape(tensor, in_blocks=True))
        for candidate in candidates:
            scales = by_name.get(candidate)
            if scales is not None and scales.kind == "F32" and scales.shape in shapes:
                joined[name] = tensor._replace(kind=FP8, scales=scales)
                del joined[scales.name]
                break
    return joined


def scale_shape(tensor: Stored, in_blocks: bool) -> tuple[int, ...]:
    """Return the shape of the scales of an FP8 tensor: one per matrix, two per expert for gate and up, or one per block."""
    *experts, outputs, inputs = tensor.shape
    if in_blocks:
        return (*experts, -(-outputs // SCALE_BLOCK), -(-inputs // SCALE_BLOCK))
    if not experts:
        return ()
    return (*experts, 2 if tensor.name.endswith("gate_up_proj") else 1, 1)


def dequantize_gguf(kind: str, raw: bytearray, rows: int) -> np.ndarray:
    """Dequantize rows that llama.cpp's own tool has quantized, with the package `gguf`; returns (rows, numbers) in float32."""
    import gguf  # optional: only quantized files need it

    return gguf.dequantize(np.frombuffer(raw, np.uint8).reshape(rows, -1), gguf.GGMLQuantizationType[kind])


def gguf_settings(file: Path) -> dict[str, Any]:
    """Return the keys of a GGUF file with their values."""
    return _gguf(file)[0]


def _safetensors(file: Path) -> Iterator[Stored]:
    size = file.stat().st_size
    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        if length > size - 8:
            raise ValueError(f"it states a header of {length} bytes, but has {size} bytes in all")
        pairs = json.loads(data.read(length), object_pairs_hook=list)  # a dict would hide a duplicate name
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("its header has the same name twice")
    end = 0
    infos = [(name, dict(info)) for name, info in pairs if name != "__metadata__"]
    for name, info in sorted(infos, key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        if start != end:
            raise ValueError(f"{name} begins at {start}, not at {end}, where the tensor before it ends")
        end = stop
        shape = tuple(info["shape"])
        if info["dtype"] in FLOAT_DTYPES and stop - start != math.prod(shape) * FLOAT_DTYPES[info["dtype"]].itemsize:
            raise ValueError(f"{name} has {stop - start} bytes for the shape {shape}")
        # Offsets count from the end of the header, which follows 8 bytes that state its length.
        yield Stored(name, file, info["dtype"], shape, 8 + length + start, stop - start)
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end}, the file at {size}")


def _gguf(file: Path) -> tuple[dict[str, Any], list[Stored]]:
    """Parse llama.cpp's container (docs/gguf.md, version 3): counts, keys, tensors' names and places, then aligned data."""
    with file.open("rb") as data:

        def take(code: str) -> Any:
            return struct.unpack(f"<{code}", data.read(struct.calcsize(f"<{code}")))[0]

        def text() -> str:
            return data.read(take("Q")).decode()

        def value(kind: int) -> Any:
            if kind == _GGUF_STRING:
                return text()
            if kind == _GGUF_ARRAY:
                inner = take("I")
                length = take("Q")
                return [value(inner) for _ in range(length)]
            return take(_GGUF_SCALARS[kind])

        # Every number in the file is little-endian, which `take` states by `<`.
        if data.read(4) != b"GGUF" or take("I") != 3:
            raise ValueError("it is not a GGUF file of version 3")
        num_tensors = take("Q")
        num_keys = take("Q")
        settings: dict[str, Any] = {}
        for _ in range(num_keys):
            key = text()
            settings[key] = value(take("I"))
        places = []
        for _ in range(num_tensors):
            name = text()
            shape = tuple(take("Q") for _ in range(take("I")))[::-1]  # ggml states the fastest dim first
            # Evaluated from left to right, which is the order of the file: the code of the type, then the offset.
            places.append((name, shape, *_GGUF_TYPES[take("I")], take("Q")))
        start = data.tell() + -data.tell() % settings.get("general.alignment", 32)
    stored: list[Stored] = []
    end = 0
    for name, shape, kind, block, size, offset in sorted(places, key=lambda place: place[-1]):
        nbytes = math.prod(shape) // block * size
        # Only the padding of the alignment may lie between two tensors.
        if not end <= offset < end + 32:
            raise ValueError(f"{name} begins at {offset}; the tensor before it ends at {end}")
        end = offset + nbytes
        stored.append(Stored(name, file, kind, shape, start + offset, nbytes))
    if not start + end <= file.stat().st_size < start + end + 32:
        raise ValueError(f"its tensors end at byte {start + end}, the file at {file.stat().st_size}")
    return settings, stored
