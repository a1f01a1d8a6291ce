"""GGUF files: nothing in the header is trusted before it is checked; tensors are dequantized a range at a time and written as a
stream.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3; 2 is read too) is little-endian: magic,
version, number of tensors, number of keys; the keys with their values; the tensors' names, dims (fastest first), types and
offsets; then, aligned, their data. The package `gguf` quantizes and dequantizes. Its own reader trusts counts and lengths, and
takes minutes or all memory if these are false.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Versions of the format that are read; the last one is written."""
ALIGNMENT = 32
"""Default alignment of tensors in bytes, which is also the one that is written."""
MAX_DIMS = 4
"""Maximum number of dims of a tensor."""

GgufSettings = dict[str, Any]
"""Metadata by key: numbers, booleans, strings, lists of strings, and arrays of numbers; each reader checks the types it needs."""

# Type codes of numbers in metadata; 8 is a string, 9 an array.
_NUMBERS: dict[int, np.dtype] = {
    code: np.dtype(kind) for code, kind in enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")) if code < 8
} | {code: np.dtype(kind) for code, kind in enumerate(("<u8", "<i8", "<f8"), start=10)}
_STRING = 8
_ARRAY = 9

UNQUANTIZED_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Encodings without quantization."""
_CODES = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
_Q8_BLOCK = 32  # numbers in a block of Q8_0
_Q8_BYTES = 34  # 32 int8 and one float16 scale


class Encoding(NamedTuple):
    """How a tensor's numbers are stored."""

    name: str
    """llama.cpp's name: F32, Q8_0, Q4_K, …"""
    block: int
    """Numbers of a row that are stored together."""
    size: int
    """Bytes of such a block."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file; none of it is in memory."""

    name: str
    file: Path
    shape: tuple[int, ...]
    encoding: Encoding
    data: np.ndarray
    """Bytes of the tensor, memory-mapped: (rows…, bytes of a row)."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of what `read` returns: float32 if the file's numbers are quantized."""
        return UNQUANTIZED_DTYPES.get(self.encoding.name, UNQUANTIZED_DTYPES["F32"])

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` into memory: integers and step-1 slices of leading dims; () is the whole tensor."""
        rows = index[: len(self.shape) - 1]
        columns = index[len(self.shape) - 1 :]
        stored = np.array(self.data[rows])
        dtype = UNQUANTIZED_DTYPES.get(self.encoding.name)
        decoded = stored.view(dtype) if dtype else _dequantize(stored, self.encoding.name)
        if columns:  # blocks can only be decoded in full, so columns are selected afterwards
            decoded = np.ascontiguousarray(decoded[(..., *columns)])
        return decoded


class Gguf(NamedTuple):
    """An open file."""

    file: Path
    settings: GgufSettings
    tensors: dict[str, GgufTensor]


def open_gguf(file: str | Path) -> Gguf:
    """Open a file: read and check the header, map the data.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, or has a version or type that is not supported.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a .gguf file")
    if file.stat().st_size < 24:
        raise ValueError(f"{file} is not a GGUF file: it has only {file.stat().st_size} bytes; download it again")
    # Mapped, so that a header that states wrong offsets costs no memory.
    data = np.memmap(file, np.uint8, "r")
    cursor = _Cursor(file, data)
    if bytes(cursor.take(4, "the magic")) != MAGIC:
        raise ValueError(f"{file} is not a GGUF file: it begins with {bytes(data[:4])!r} instead of {MAGIC!r}")
    version = cursor.number("<I", "the version")
    # A big-endian version number that is read as little-endian has zero low bytes.
    if version & 0xFFFF == 0:
        raise ValueError(f"{file} is big-endian, which is not supported; convert it to little-endian (gguf-convert-endian)")
    if version not in VERSIONS:
        raise ValueError(f"{file} has GGUF version {version}; supported: {VERSIONS[0]} and {VERSIONS[1]}; convert the model again")
    num_tensors = cursor.number("<Q", "the number of tensors")
    num_keys = cursor.number("<Q", "the number of keys")
    # The smallest possible key (13 bytes) and tensor (32 bytes) bound the counts, before anything is allocated for them.
    cursor.can_hold(num_keys, 13, "keys")
    cursor.can_hold(num_tensors, 32, "tensors")
    settings: GgufSettings = {}
    for _ in range(num_keys):
        key = cursor.name("a key")
        if key in settings:
            raise ValueError(f"{file} has the key {key!r} twice")
        settings[key] = cursor.value(key)
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = settings.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{file}: general.alignment is {alignment!r}; it has to be a power of two")
    # -n % a is what n lacks to the next multiple of a.
    data_start = cursor.offset + -cursor.offset % alignment
    return Gguf(file, settings, _tensors(file, data, infos, data_start, alignment))


class _Cursor:
    """Reads a header from front to back; anything beyond the end of the file is an error before it is accessed."""

    def __init__(self, file: Path, data: np.ndarray) -> None:
        self.file = file
        self.data = data.data
        self.offset = 0

    def can_hold(self, count: int, size: int, label: str) -> None:
        """Raise ValueError if fewer than `count` items of `size` bytes are left in the file."""
        remaining = len(self.data) - self.offset
        if count * size > remaining:
            raise ValueError(
                f"{self.file} is truncated or damaged: {count:,} {label} at byte {self.offset}, but {remaining:,} bytes are left"
            )

    def take(self, size: int, label: str) -> memoryview:
        """Return the next `size` bytes."""
        self.can_hold(size, 1, f"bytes for {label}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def number(self, code: str, label: str) -> int:
        """Read a number with the given `struct` code."""
        return struct.unpack(code, self.take(struct.calcsize(code), label))[0]

    def text(self, label: str) -> str:
        """Read a string."""
        raw = self.take(self.number("<Q", f"the length of {label}"), label)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: {label} is not UTF-8 at byte {self.offset - len(raw) + error.start}") from error

    def name(self, label: str) -> str:
        """Read a string that error messages can show in a line."""
        text = self.text(label)
        if not text.isprintable() or len(text) > 256:
            raise ValueError(f"{self.file} is damaged: {label} is {text[:40]!r}, with {len(text)} characters")
        return text

    def value(self, key: str) -> Any:
        """Read the value of a key."""
        code = self.number("<I", f"the type of {key}")
        if code == _STRING:
            return self.text(key)
        if code in _NUMBERS:
            return np.frombuffer(self.take(_NUMBERS[code].itemsize, key), _NUMBERS[code])[0].item()
        if code != _ARRAY:
            raise ValueError(f"{self.file}: {key} has the unknown type {code}")
        code = self.number("<I", f"the type of {key}")
        length = self.number("<Q", f"the length of {key}")
        if code == _STRING:
            # A string takes at least the 8 bytes of its length. Checked before a list of that many is made.
            self.can_hold(length, 8, f"strings in {key}")
            return [self.text(f"entry {i} of {key}") for i in range(length)]
        if code not in _NUMBERS:
            raise ValueError(f"{self.file}: {key} is an array of the type {code}, which is not supported")
        self.can_hold(length, _NUMBERS[code].itemsize, f"numbers in {key}")
        return np.frombuffer(self.take(length * _NUMBERS[code].itemsize, key), _NUMBERS[code])


class _Info(NamedTuple):
    """What the header states about a tensor."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int


def _tensor_info(cursor: _Cursor) -> _Info:
    """Read the header's entry for a tensor."""
    name = cursor.name("a tensor's name")
    count = cursor.number("<I", f"the number of dims of {name}")
    if not 1 <= count <= MAX_DIMS:
        raise ValueError(f"{cursor.file}: {name} has {count} dims; the format allows 1 to {MAX_DIMS}")
    dims = [cursor.number("<Q", f"a dim of {name}") for _ in range(count)]
    shape = tuple(reversed(dims))  # the file states the fastest dim first
    code = cursor.number("<I", f"the type of {name}")
    encoding = _encoding(cursor.file, name, code)
    if 0 in dims or math.prod(dims) >= 2**60:
        raise ValueError(f"{cursor.file}: {name} has the impossible shape {shape}")
    if shape[-1] % encoding.block:
        raise ValueError(f"{cursor.file}: {name} has rows of {shape[-1]} numbers; {encoding.name} has blocks of {encoding.block}")
    return _Info(name, shape, encoding, cursor.number("<Q", f"the offset of {name}"))


def _encoding(file: Path, name: str, code: int) -> Encoding:
    """Return the encoding with llama.cpp's type code, after checking that it can be decoded."""
    for encoding, dtype in UNQUANTIZED_DTYPES.items():
        if code == _CODES[encoding]:
            return Encoding(encoding, 1, dtype.itemsize)
    gguf = import_gguf(f"{file}: {name} is quantized")
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # The package names more types than it can dequantize, so a block is tried.
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{file}: {name} has the type {code}, which the package gguf cannot read: {error}") from error
    return Encoding(kind.name, block, size)


def _tensors(file: Path, data: np.ndarray, infos: Iterable[_Info], start: int, alignment: int) -> dict[str, GgufTensor]:
    """Return the tensors after checking that each is inside the file and that none overlap."""
    tensors: dict[str, GgufTensor] = {}
    end = 0
    previous = ""
    # In the order of their data, so that comparing each tensor with the end of the one before finds every overlap.
    for name, shape, encoding, offset in sorted(infos, key=lambda info: info.offset):
        if name in tensors:
            raise ValueError(f"{file} has the tensor {name} twice")
        row = shape[-1] // encoding.block * encoding.size
        size = math.prod(shape[:-1]) * row
        if offset % alignment:
            raise ValueError(f"{file}: {name} is at {offset}, which is no multiple of the alignment {alignment}")
        if offset < end:
            raise ValueError(f"{file}: {name} overlaps {previous}")
        if start + offset + size > len(data):
            raise ValueError(f"{file} is truncated: {name} ends at byte {start + offset + size:,}, the file at {len(data):,}")
        tensor_bytes = data[start + offset : start + offset + size].reshape(*shape[:-1], row)
        tensors[name] = GgufTensor(name, file, shape, encoding, tensor_bytes)
        end = offset + size
        previous = name
    return tensors


# --- writing -----------------------------------------------------------------------------------------------------


class GgufSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    """F32, F16, BF16 or Q8_0; Q8_0 requires rows of a multiple of 32 numbers."""


def write_gguf(
    file: Path, settings: GgufSettings, specs: Sequence[GgufSpec], parts: Callable[[GgufSpec], Iterable[np.ndarray]]
) -> None:
    """Write a GGUF file.

    Args:
        file: the file.
        settings: values by key as in `Gguf`, with numbers as numpy's (np.uint32(8)).
        specs: tensors in the order in which they are written.
        parts: returns a tensor in consecutive parts of rows, float32 if they are to be quantized; called for one tensor at a
            time.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(specs), len(settings)))
    for key, value in settings.items():
        header += _text(key) + _value(value)
    offset = 0
    for spec in specs:
        # Reversed, since the format states the fastest dim first.
        header += _text(spec.name) + struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
        header += struct.pack("<IQ", _CODES[spec.encoding], offset)
        # Offsets count from the start of the data, and each has to be a multiple of the alignment.
        offset += encoded_bytes(spec) + -encoded_bytes(spec) % ALIGNMENT
    try:
        with file.open("wb") as out:
            out.write(header + bytes(-len(header) % ALIGNMENT))
            for spec in specs:
                written = 0
                for part in parts(spec):
                    if spec.encoding not in UNQUANTIZED_DTYPES:
                        part = _quantize(part, spec.encoding)
                    assert part.dtype in (UNQUANTIZED_DTYPES.get(spec.encoding), np.uint8), (spec, part.dtype)
                    written += out.write(np.ascontiguousarray(part).view(np.uint8).data)
                # The header already states the offsets of the tensors that follow.
                assert written == encoded_bytes(spec), (spec, written)
                out.write(bytes(-written % ALIGNMENT))
    except OSError as error:
        error.filename = error.filename or str(file)  # a failed write does not state its file
        raise


def encoded_bytes(spec: GgufSpec) -> int:
    """Return the bytes of a tensor in the file."""
    numbers = math.prod(spec.shape)
    if spec.encoding in UNQUANTIZED_DTYPES:
        return numbers * UNQUANTIZED_DTYPES[spec.encoding].itemsize
    return numbers // _Q8_BLOCK * _Q8_BYTES


def fits(encoding: str, shape: tuple[int, ...]) -> bool:
    """Return whether rows of this shape can be stored in the encoding."""
    return encoding in UNQUANTIZED_DTYPES or shape[-1] % _Q8_BLOCK == 0


def _text(text: str) -> bytes:
    """Encode a string: its length in bytes, then UTF-8."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | list[str] | np.ndarray | np.generic) -> bytes:
    """Encode a value: the code of its type, then the value."""
    codes = {kind: code for code, kind in _NUMBERS.items()}
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    number = np.asarray(value)
    code = codes[number.dtype.newbyteorder("<")]
    if number.ndim == 0:
        return struct.pack("<I", code) + number.tobytes()
    return struct.pack("<IIQ", _ARRAY, code, len(number)) + number.tobytes()


# --- quantized numbers -------------------------------------------------------------------------------------------


def import_gguf(reason: str) -> ModuleType:
    """Import the package `gguf`. Raises ValueError, whose message begins with `reason`, if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{reason}, which requires the package gguf; run: bash launch/install.sh gguf, or pip install gguf"
        ) from error
    return gguf


def _dequantize(rows: np.ndarray, encoding: str) -> np.ndarray:
    """Decode the bytes of rows, (…, bytes), to float32."""
    gguf = import_gguf(f"{encoding} is quantized")
    numbers = gguf.dequantize(rows.reshape(-1, rows.shape[-1]), gguf.GGMLQuantizationType[encoding])
    return numbers.reshape(*rows.shape[:-1], -1)


def _quantize(rows: np.ndarray, encoding: str) -> np.ndarray:
    """Encode float32 rows as bytes."""
    gguf = import_gguf(f"{encoding} is quantized")
    assert rows.dtype == np.float32, rows.dtype
    return gguf.quantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[encoding])
