"""Weights that lie on disk: their common dtype, and hashes of every byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_train.weights import on_disk, safetensors_files
from moe_train.weights.on_disk import WeightFiles
from tests.tiny import MIXTRAL


class InMemory(NamedTuple):
    """A tensor as `on_disk.FileTensor` describes it."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        return self.array[index].copy()


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [(["float32"], "float32"), ([ml_dtypes.bfloat16] * 2, "bfloat16"), (["float32", "float16"], None), (["float64"], None)],
)
def test_the_dtype_of_all_tensors(dtypes: list[Any], common: str | None) -> None:
    tensors = {str(i): InMemory(str(i), np.ones(2, dtype)) for i, dtype in enumerate(dtypes)}
    assert WeightFiles(Path("x"), MIXTRAL, [], tensors).dtype == common


def test_hashes_cover_dtype_shape_and_bytes_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.arange(12.0).reshape(4, 3), np.arange(12.0).reshape(3, 4), np.arange(12), np.zeros((0,)), np.array(1.0)[None]]
    tensors = {str(i): InMemory(str(i), array) for i, array in enumerate(arrays)}
    whole = on_disk.hash_tensors(tensors)
    assert whole["0"] == hashlib.sha256(b"float64 (4, 3)" + arrays[0].tobytes()).hexdigest()
    assert len(set(whole.values())) == len(arrays)
    monkeypatch.setattr(on_disk, "HASH_CHUNK_BYTES", 24)  # a row at a time
    assert on_disk.hash_tensors(tensors) == whole


def test_the_hash_of_a_scalar_covers_its_value(tmp_path: Path) -> None:
    save_file({"a": np.array(1.0, np.float32), "b": np.array(2.0, np.float32)}, tmp_path / "model.safetensors")
    tensors = safetensors_files.open_safetensors(tmp_path / "model.safetensors")
    hashes = on_disk.hash_tensors(tensors)
    assert hashes["a"] == hashlib.sha256(b"float32 ()" + np.float32(1).tobytes()).hexdigest() != hashes["b"]
