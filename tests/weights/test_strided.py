"""Copies of transposed views hold what numpy's own hold."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.weights import strided

X = np.random.default_rng(0).normal(size=(37, 5, 70)).astype(np.float32)
VIEWS = {"in order": X, "turned": X.T, "dims swapped": X.swapaxes(0, 2), "a vector": X[0, 0], "every other": X[:, :, ::2]}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contiguous_is_numpys(x: np.ndarray, dtype: str) -> None:
    found = strided.contiguous(x, np.dtype(dtype))
    assert found.flags.c_contiguous and found.dtype == dtype
    assert np.array_equal(found, x.astype(dtype))


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
def test_copies_into_an_array(x: np.ndarray) -> None:
    out = np.zeros(x.shape, np.float64)
    strided.copy_into(out, x)
    assert np.array_equal(out, x)


def test_a_large_view_comes_in_parts_and_is_never_copied_whole() -> None:
    x = np.arange(2**19, dtype=np.float64).reshape(512, 1024).T
    found = list(strided.contiguous_parts(x))
    assert len(found) == 4 and all(part.flags.c_contiguous for part in found)
    assert np.array_equal(np.concatenate(found), x)
    (same,) = strided.contiguous_parts(x.T)
    assert same.base is x.base  # nothing to copy
