"""Decode the numbers of files, and bound how far rounding and quantization may have taken them from the exact ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_train.proof import fp8, reread

MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
"""Explicit mantissa bits of each dtype."""
SMALLEST_EXPONENT = {"F32": -126, "F16": -14, "BF16": -126}
"""Exponent of the smallest normal number of each dtype."""
EXPONENT_MASK = np.uint64(0x7FF << 52)
"""Mask of the exponent bits of a float64."""


class QuantizationBound(NamedTuple):
    """Upper bound of the rounding error of numbers that llama.cpp has quantized."""

    block: int
    """Numbers that share scales."""
    share: float
    """Maximum error as a share of the largest number of a block.

    If a scale is computed from the extremes of its numbers, this follows from the number of levels; otherwise it is a quarter more
    than the largest error found for numbers of fifteen distributions.
    """
    levels: int
    """Additional error in units of the rounding of the smallest half-precision scale."""


QUANTIZATION_BOUNDS = {
    "Q4_0": QuantizationBound(32, 1 / 8, 8),
    "Q4_1": QuantizationBound(32, 1 / 15, 16),
    "Q5_0": QuantizationBound(32, 1 / 16, 16),
    "Q5_1": QuantizationBound(32, 1 / 31, 32),
    "Q2_K": QuantizationBound(256, 0.5, 60),
    "Q3_K": QuantizationBound(256, 0.34, 128),
    "Q4_K": QuantizationBound(256, 0.15, 1008),
    "Q5_K": QuantizationBound(256, 0.075, 2016),
    "Q6_K": QuantizationBound(256, 0.025, 4096),
    "IQ4_NL": QuantizationBound(32, 0.16, 127),
    "IQ4_XS": QuantizationBound(256, 0.17, 4064),
}
"""Bounds by kind, except for Q8_0, whose exact bound is in `decode_with_tolerance`."""
DECODED_KINDS = (*MANTISSA, "Q8_0", reread.FP8, *QUANTIZATION_BOUNDS)
"""Kinds of numbers that can be decoded here; tensors of other kinds are hashed only."""


def decode_with_tolerance(
    kind: str, raw: bytearray, exact: np.ndarray, scales: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a chunk of a file.

    Args:
        kind: how the numbers are stored.
        raw: the bytes.
        exact: the exact numbers, (rows, numbers) in float64.
        scales: the scale of each number, for FP8.

    Returns:
        The numbers in float64, and how far each may be from `exact`: one unit in the last place; for Q8_0, half a step of its
        block's scale plus the rounding of the scale itself, a float16; for FP8, half a step of the format; for other kinds as in
        `QUANTIZATION_BOUNDS`.
    """
    if kind == reread.FP8:
        assert scales is not None
        return fp8.decode(raw, scales, exact)
    if kind in QUANTIZATION_BOUNDS:
        written = reread.dequantize_gguf(kind, raw, len(exact)).astype(np.float64)
        block, share, levels = QUANTIZATION_BOUNDS[kind]
        blocks = np.abs(exact).reshape(len(exact), -1, block)
        # 2^-25 is half the smallest float16, to which a block's scale may have been rounded.
        allowed = np.broadcast_to(share * blocks.max(-1, keepdims=True) * 1.01 + levels * 2.0**-25, blocks.shape)
        return written, allowed.reshape(exact.shape)
    if kind != "Q8_0":
        # With its mantissa bits cleared, a float64 is the largest power of two up to its magnitude.
        power = (exact.view(np.uint64) & EXPONENT_MASK).view(np.float64)
        written = np.frombuffer(raw, reread.FLOAT_DTYPES[kind]).astype(np.float64).reshape(exact.shape)
        # Subnormal numbers have the spacing of the smallest normal ones.
        return written, np.maximum(power, 2.0 ** SMALLEST_EXPONENT[kind]) * 2.0 ** -MANTISSA[kind]
    quantized_blocks = np.frombuffer(raw, reread.Q8_0).reshape(len(exact), -1)
    written = (quantized_blocks["scale"].astype(np.float64)[..., None] * quantized_blocks["q"]).reshape(exact.shape)
    step = np.abs(exact).reshape(*quantized_blocks.shape, 32).max(-1, keepdims=True) / 127
    # The scale is off by at most 2^-11 of itself (or half the smallest float16), and is multiplied by up to 127.
    allowed = np.broadcast_to(0.5 * step + 127 * np.maximum(step * 2.0**-11, 2.0**-25), (*quantized_blocks.shape, 32))
    return written, allowed.reshape(exact.shape) * 1.001
