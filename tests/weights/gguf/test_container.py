"""GGUF containers: parts of quantized tensors, and files that are damaged or state wrong sizes."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.weights.gguf import container


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16"])
def test_parts_of_quantised_tensors_are_read_alone(kind: str, tmp_path: Path) -> None:
    encoding = package.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(3, 8, 64)).astype(np.float32)
    stored = package.quantize(values, encoding)
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=encoding)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    tensor = container.open_gguf(tmp_path / "x.gguf").tensors["x"]
    whole = package.dequantize(stored, encoding)
    assert tensor.shape == (3, 8, 64)
    for index in ((), (1,), (slice(1, 3),), (2, slice(3, 5)), (0, slice(0, 8), slice(5, 40)), (slice(0, 2), 7, slice(33, 34))):
        assert np.array_equal(tensor.read(index).astype(np.float32), whole[index]), index


def text_of(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, code: int, value: bytes) -> bytes:
    return text_of(name) + struct.pack("<I", code) + value


def tensor(name: str, dims: tuple[int, ...] = (4,), code: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    return text_of(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if count is None else count, *dims, code, offset)


def file_of(
    keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (tensor("x"),), data: int = 64, start: bytes = b"GGUF",
    version: int = 3, num_tensors: int | None = None, num_keys: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = start + struct.pack("<IQQ", version, *counts) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32 + data)


HUGE = 2**63
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file: it has only 0 bytes"),
    "cut in the counts": (file_of()[:20], "not a GGUF file: it has only 20 bytes"),
    "another magic": (file_of(start=b"GGML"), r"begins with b'GGML'"),
    "version 1": (file_of(version=1), "GGUF version 1; supported: 2 and 3"),
    "a future version": (file_of(version=4), "GGUF version 4"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "too many tensors": (file_of(num_tensors=HUGE), "damaged: 9,223,372,036,854,775,808 tensors"),
    "too many keys": (file_of(num_keys=HUGE), "damaged: 9,223,372,036,854,775,808 keys"),
    "a tensor more than there is": (file_of(num_tensors=2), "damaged|dims"),
    "a key more than there is": (file_of(num_keys=1), "unknown type|damaged|UTF-8"),
    "a key twice": (file_of((key("a", 4, bytes(4)), key("a", 4, bytes(4)))), "the key 'a' twice"),
    "a key of 2**63 letters": (file_of((struct.pack("<Q", HUGE),)), "bytes for a key"),
    "a key that is no text": (file_of((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "a key is not UTF-8"),
    "a text of 2**63 letters": (file_of((key("a", 8, struct.pack("<Q", HUGE)),)), "bytes for a at byte"),
    "an unknown kind of value": (file_of((key("a", 13, bytes(8)),)), "a has the unknown type 13"),
    "2**63 numbers": (file_of((key("a", 9, struct.pack("<IQ", 4, HUGE)),)), "numbers in a"),
    "2**63 texts": (file_of((key("a", 9, struct.pack("<IQ", 8, HUGE)),)), "strings in a"),
    "2**60 bytes": (file_of((key("a", 9, struct.pack("<IQ", 0, 2**60)),)), "numbers in a"),
    "lists in a list": (file_of((key("a", 9, struct.pack("<IQ", 9, 1)),)), "array of the type 9"),
    "an alignment of 0": (file_of((key("general.alignment", 4, struct.pack("<I", 0)),)), "general.alignment is 0"),
    "an alignment of 24": (file_of((key("general.alignment", 4, struct.pack("<I", 24)),)), "general.alignment is 24"),
    "an alignment in words": (file_of((key("general.alignment", 8, text_of("32")),)), "general.alignment is '32'"),
    "a name of 2**63 letters": (file_of(tensors=(struct.pack("<Q", HUGE) + bytes(32),)), "bytes for a tensor's name"),
    "no dims": (file_of(tensors=(tensor("x", (4,), count=0),)), "x has 0 dims"),
    "2**32 dims": (file_of(tensors=(tensor("x", (4,), count=2**32 - 1),)), "x has 4294967295 dims"),
    "a dim of 0": (file_of(tensors=(tensor("x", (0, 4)),)), r"x has the impossible shape \(4, 0\)"),
    "2**80 numbers": (file_of(tensors=(tensor("x", (2**40, 2**40)),)), "x has the impossible shape"),
    "2**50 numbers": (file_of(tensors=(tensor("x", (2**50,)),)), "truncated: x ends at byte"),
    "an unknown type": (file_of(tensors=(tensor("x", (32,), 99),)), "x has the type 99"),
    "a type that was removed": (file_of(tensors=(tensor("x", (32,), 4),)), "x has the type 4"),
    "a type that holds no weights": (file_of(tensors=(tensor("x", (32,), 24),)), "x has the type 24"),
    "part of a block": (file_of(tensors=(tensor("x", (33,), 8),)), "rows of 33 numbers; Q8_0 has blocks of 32"),
    "a tensor twice": (file_of(tensors=(tensor("x"), tensor("x", offset=32))), "the tensor x twice"),
    "off the alignment": (file_of(tensors=(tensor("x", offset=8),)), "x is at 8, which is no multiple of the alignment 32"),
    "overlapping": (file_of(tensors=(tensor("x", (16,)), tensor("y", offset=32))), "y overlaps x"),
    "in one place": (file_of(tensors=(tensor("x"), tensor("y"))), "y overlaps x"),
    "beyond the end": (file_of(tensors=(tensor("x", offset=2**62),)), "truncated: x ends at byte"),
    "cut in the data": (file_of()[:-60], "truncated: x ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = MALFORMED[name]
    (tmp_path / "x.gguf").write_bytes(content)
    before = time.monotonic()
    with pytest.raises(ValueError, match=said) as error:
        container.open_gguf(tmp_path / "x.gguf")
    assert time.monotonic() - before < 2 and "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    """What the damaged ones are made of."""
    (tmp_path / "x.gguf").write_bytes(file_of((key("a", 9, struct.pack("<IQ2I", 4, 2, 7, 8)), key("b", 7, b"\1")), data=16))
    opened = container.open_gguf(tmp_path / "x.gguf")
    assert opened.settings["a"].tolist() == [7, 8] and opened.settings["b"] is True
    assert opened.tensors["x"].read().tolist() == [0, 0, 0, 0]


@given(st.data())
@settings(max_examples=400, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Never another exception, never more memory than the file has bytes, never a read beyond it."""
    keys = (
        key("general.alignment", 4, struct.pack("<I", 32)),
        key("t", 9, struct.pack("<IQ", 8, 2) + text_of("ab") + text_of("c")),
    )
    content = bytearray(file_of((*keys, key("n", 6, bytes(4))), (tensor("x", (4, 2)), tensor("y", (32,), 8, 32)), data=96))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(content) - 97))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 8, 9, 127, 128, 255])))
    end = data.draw(st.integers(24, len(content)) | st.just(len(content)))
    (tmp_path / "x.gguf").write_bytes(content[:end])
    try:
        opened = container.open_gguf(tmp_path / "x.gguf")
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for found in opened.tensors.values():
        assert found.read().shape == found.shape
