"""The second reader against the libraries of the formats, and files that it must refuse."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_train.proof import reread
from moe_train.proof.reread import Stored

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "norm": np.ones(5, np.float16),
}


def rows_of(stored: Stored, start: int, stop: int) -> bytes:
    with stored.file.open("rb") as file:
        return bytes(stored.read(file.fileno(), start, stop))


def test_tensors_of_safetensors_files_are_those_of_the_library(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors", {"format": "pt"})
    found = reread.tensors(tmp_path)
    assert {name: (t.kind, t.shape, t.rows) for name, t in found.items()} == {
        **{"a": ("F32", (2, 3, 4), 6), "b": ("BF16", (2, 3), 2), "norm": ("F16", (5,), 1)}
    }
    for name, array in ARRAYS.items():
        assert rows_of(found[name], 0, found[name].rows) == array.tobytes()
    assert rows_of(found["a"], 2, 4) == ARRAYS["a"].reshape(6, 4)[2:4].tobytes()


def test_tensors_and_keys_of_gguf_files_are_those_of_the_library(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    kinds = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("words", ["one", "two"])
    for kind in kinds:
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = reread.tensors(tmp_path)
    assert reread.gguf_settings(tmp_path / "x.gguf") == {"general.architecture": "llama", "words": ["one", "two"]}
    for kind in kinds:
        stored, wanted = found[kind.name], gguf.quantize(values, kind)
        assert (stored.kind, stored.shape) == (kind.name, (3, 64))
        raw = rows_of(stored, 0, 3)
        assert raw == wanted.tobytes()
        assert np.array_equal(reread.dequantize_gguf(kind.name, bytearray(raw), 3), gguf.dequantize(wanted, kind))
    blocks = np.frombuffer(rows_of(found["Q8_0"], 0, 3), reread.Q8_0)
    plain = (blocks["scale"].astype(np.float32)[:, None] * blocks["q"]).reshape(3, 64)
    assert np.array_equal(plain, gguf.dequantize(gguf.quantize(values, kinds[0]), kinds[0]))


def header(tensors: str, data: int, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(tensors) if length is None else length) + tensors.encode() + bytes(data)


A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (header("{" + A + "}", 8, length=10**9), "it states a header of 1000000000 bytes"),
        (header("{" + A + "," + A + "}", 8), "its header has the same name twice"),
        (header("{" + A + "," + A.replace('"a"', '"b"') + "}", 8), "b begins at 0, not at 8"),
        (header("{" + A.replace("[2]", "[3]") + "}", 8), r"a has 8 bytes for the shape \(3,\)"),
        (header("{" + A + "}", 9), "its tensors end at byte"),
        (header("{", 0), "x.safetensors cannot be read"),
    ],
)
def test_bytes_of_no_tensor_or_of_two_are_refused(content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=error):
        reread.tensors(tmp_path)


def test_a_name_in_two_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(header("{" + A + "}", 8))
    (tmp_path / "notes.json").write_text(json.dumps({}))  # not a file of weights
    with pytest.raises(ValueError, match=r"a is in one\.safetensors and in two\.safetensors"):
        reread.tensors(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<I", 2))
    with pytest.raises(ValueError, match="it is not a GGUF file of version 3"):
        reread.gguf_settings(tmp_path / "x.gguf")


def test_a_file_that_ends_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(7))
    with pytest.raises(ValueError, match=r"x ends inside a; copy the file again$"):
        rows_of(Stored("a", tmp_path / "x", "F32", (2,), 0, 8), 0, 1)
