"""Reading parts of FP8 tensors: bit for bit the formula, and damaged values are refused with their place."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.weights.fp8 import tensor
from moe_train.weights.fp8.tensor import Fp8Tensor, ScaleGrid
from tests.weights.fp8.files import BF16, E4M3, reference

EVERY_CODE = np.arange(256, dtype=np.uint8).view(E4M3)
F32 = np.dtype(np.float32)
NUMBERS = EVERY_CODE[~np.isnan(EVERY_CODE.astype(np.float32))]


class InMemory:
    """A tensor that is read like one of a file, and counts what was read."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name = name
        self.file = Path("model.safetensors")
        self.array = array
        self.numbers_read = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        part = self.array[index]
        self.numbers_read += part.size
        return part.copy()


def quantized(shape: tuple[int, ...], steps: tuple[int, ...], scale_dtype: np.dtype = F32) -> tuple[Fp8Tensor, np.ndarray]:
    """A random tensor, and what it stands for."""
    rng = np.random.default_rng(0)
    grid = tuple(-(-size // step) for size, step in zip(shape, steps, strict=True))
    codes = rng.choice(NUMBERS, shape)
    scales = np.exp(rng.normal(-5, 2, grid)).astype(scale_dtype)
    whole = Fp8Tensor(InMemory("w", codes), InMemory("w_scale_inv", scales), ScaleGrid(grid, steps), BF16)
    return whole, reference(codes, scales, steps)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_is_what_the_formula_gives(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    steps = tuple(data.draw(st.integers(1, size)) for size in shape)
    scale_dtype = np.dtype(data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16])))
    whole, exact = quantized(shape, steps, scale_dtype)
    index: list[int | slice] = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        start = data.draw(st.integers(0, size - 1))
        index.append(start if data.draw(st.booleans()) else slice(start, data.draw(st.integers(start, size))))
    part = whole.read(tuple(index))
    assert part.dtype == BF16
    np.testing.assert_array_equal(part.view(np.uint16), exact[tuple(index)].view(np.uint16))


def test_long_tensors_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "CHUNK_NUMBERS", 10)
    whole, exact = quantized((3, 7, 6), (1, 4, 3))
    np.testing.assert_array_equal(whole.read(), exact)
    np.testing.assert_array_equal(whole.read((2, slice(1, 6))), exact[2, 1:6])


def test_only_the_scales_of_a_part_are_read() -> None:
    whole, _ = quantized((64, 64), (4, 4))
    whole.read((slice(8, 12), slice(0, 8)))
    assert isinstance(whole.codes, InMemory) and isinstance(whole.scales, InMemory)
    assert whole.codes.numbers_read == 4 * 8 and whole.scales.numbers_read == 2


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_is_refused_with_its_place(byte: int) -> None:
    whole, _ = quantized((4, 6), (2, 3))
    assert isinstance(whole.codes, InMemory)
    whole.codes.array.view(np.uint8)[2, 5] = byte
    with pytest.raises(ValueError, match=r"^model\.safetensors: w\[2, 5\] is NaN \(byte 0x7F or 0xFF of e4m3\)[^\n]*again$"):
        whole.read((slice(1, 4),))
    whole.read((slice(0, 2),))


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_is_no_positive_number_is_refused_with_its_place(value: float) -> None:
    whole, _ = quantized((4, 6), (2, 3))
    assert isinstance(whole.scales, InMemory)
    whole.scales.array[1, 0] = value
    with pytest.raises(ValueError, match=r"w_scale_inv\[1, 0\] is .*, but a scale has to be a positive number"):
        whole.read((slice(2, 4),))
    whole.read((slice(0, 2),))
