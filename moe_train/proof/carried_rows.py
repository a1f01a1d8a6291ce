"""Rows of the matrices of a base's tower as an export has them: dequantized, and in the order of its layout."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_train.proof import base_fp8, reread
from moe_train.proof.reread import Stored


def rows_of(stored: Stored, kind: str, of_base: Mapping[str, Stored], block: tuple[int, int] | None) -> np.ndarray:
    """Read a matrix row by row: its bytes, or its numbers in the dtype of the export if FP8 is not what the export has.

    Args:
        stored: the matrix in the base.
        kind: its dtype in the export.
        of_base: the tensors of the base, scales among them.
        block: outputs and inputs of a block of FP8 numbers, where the base's config states them.
    """
    if kind != stored.kind:
        parts = [values for _, values in base_fp8.dequantize(of_base, stored.name, block)]
        return np.concatenate(parts).astype(reread.FLOAT_DTYPES[kind])
    with stored.file.open("rb") as file:
        raw = stored.read(file.fileno(), 0, stored.rows)
    return np.frombuffer(raw, np.uint8).reshape(stored.rows, -1)


def reordered(rows: np.ndarray, heads: int, to_native: bool) -> np.ndarray:
    """Return the rows of queries or keys in the rotary order of another layout.

    Args:
        rows: one row for each output.
        heads: number of heads, within which rows change places; 0 for a matrix whose rows stay.
        to_native: whether they go to the order of Mistral's own layout, or from there to Hugging Face's.
    """
    if not heads:
        return rows
    size = len(rows) // heads
    order = np.arange(len(rows)).reshape(heads, size)
    # Row 2i of a head in Mistral's own layout is row i in Hugging Face's, and row 2i + 1 is row size / 2 + i.
    native_to_half = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    order = order[:, np.argsort(native_to_half)] if to_native else order[:, native_to_half]
    return rows[order.reshape(-1)]
