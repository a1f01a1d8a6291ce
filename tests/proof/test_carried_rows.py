"""Rows of a base's tower as an export has them, against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from moe_train.proof import reread
from moe_train.proof.carried_rows import reordered, rows_of


def test_rows_change_places_within_each_head() -> None:
    native = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])
    halves = np.array([[0], [2], [1], [3], [10], [12], [11], [13]])
    assert np.array_equal(reordered(native, 2, to_native=False), halves)
    assert np.array_equal(reordered(halves, 2, to_native=True), native)
    assert reordered(native, 0, to_native=True) is native


def test_fp8_numbers_are_multiplied_by_their_scale_and_rounded_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    codes = np.array([[1.0, -448.0], [0.875, 2.0**-9]], ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file({"a.weight": codes, "a.weight_scale_inv": np.float32([0.3])}, file)
    stored = reread.tensors_of_files([file])
    expected = (codes.astype(np.float32) * np.float32(0.3)).astype(ml_dtypes.bfloat16)
    assert rows_of(stored["a.weight"], "BF16", stored, None).tobytes() == expected.tobytes()
    assert rows_of(stored["a.weight"], "F8_E4M3", stored, None).tobytes() == codes.tobytes()
