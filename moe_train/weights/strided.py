"""Copy between an array and its transpose. numpy alone would touch a whole cache line for each number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CACHE_LINE_BYTES = 64
"""Bytes of a cache line."""


def contiguous(x: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """Return `np.ascontiguousarray(x, dtype)`, several times as fast if x is a transposed view."""
    dtype = x.dtype if dtype is None else dtype
    if x.ndim < 2 or x.flags.c_contiguous:
        return np.ascontiguousarray(x, dtype)
    out = np.empty(x.shape, dtype)
    copy_into(out, x)
    return out


def copy_into(out: np.ndarray, x: np.ndarray) -> None:
    """Do `out[...] = x`, several times as fast if x is a transposed view and out is contiguous."""
    if x.ndim < 2 or x.flags.c_contiguous:
        out[...] = x
        return
    # Columns of one cache line at a time: the lines that these touch in x stay in the cache until all of their numbers are used.
    step = max(1, CACHE_LINE_BYTES // out.itemsize)
    for start in range(0, x.shape[-1], step):
        out[..., start : start + step] = x[..., start : start + step]


def contiguous_parts(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield x in order, in contiguous parts of about a MiB; a transposed view is never copied as a whole."""
    if x.flags.c_contiguous:
        yield x
        return
    # Rows per MiB.
    step = max(1, 2**20 * len(x) // x.nbytes)
    for start in range(0, len(x), step):
        yield contiguous(x[start : start + step])
